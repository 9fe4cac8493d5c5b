"""The frozen encoder of a run: trained or, as a control, as it was before it learned anything.

B windows | C channels | Z Y X window, voxels | L tokens of a window | D numbers of a token
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mimscale.evaluate.weights import load_model
from mimscale.models.config import Zyx
from mimscale.models.encoder import tokens_and_grid
from mimscale.train.build import build_pretrain, build_segmenter
from mimscale.train.config import FinetuneConfig, PretrainConfig


@dataclass(frozen=True)
class FrozenEncoder:
    """An encoder in eval mode, on its device."""

    encoder: nn.Module
    name: str  # what tables call its weights
    contract: dict[str, Any]  # of the checkpoint
    device: torch.device
    grid: Zyx  # tokens of a window along Z, Y, X
    dim: int  # numbers of a token

    @torch.inference_mode()
    def tokens(self, windows: Tensor) -> Tensor:
        """[B, C, Z, Y, X] on the CPU -> [B, L, D] float32 on the CPU, as the encoder's end gives them."""
        tokens, _ = tokens_and_grid(self.encoder(windows.to(self.device)), self.grid)
        return tokens.float().cpu()

    def sha256(self) -> str:
        """Of the encoder's weights alone: a head or a decoder does not change its features."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.encoder.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def frozen_encoder(
    run_config: PretrainConfig | FinetuneConfig,
    tag: Path,
    channels: int,
    device: torch.device,
    *,
    weights: Literal["trained", "random"],
    seed: int,
) -> FrozenEncoder:
    """The encoder of a checkpoint, or the same architecture with the start weights of `seed`.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ConfigError: the store has another number of channels.
    """
    model, contract = load_model(run_config, tag, channels, device)
    name = "trained"
    if weights == "random":
        name = f"random, seed {seed}"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = (
                build_pretrain(run_config, channels)
                if isinstance(run_config, PretrainConfig)
                else build_segmenter(run_config, channels)
            )
        model.to(device).eval()
    encoder = model.encoder
    assert isinstance(encoder, nn.Module), "every model here has one of that name"
    with torch.inference_mode():
        window = torch.zeros((1, channels, *run_config.crop_voxels), device=device)
        tokens, grid = tokens_and_grid(encoder(window), getattr(encoder, "grid", None))
    return FrozenEncoder(encoder, name, contract, device, grid, tokens.shape[2])
