"""The frozen encoder of a run: trained or, as a control, as it was before it learned anything.

B windows | C channels | Z Y X window, voxels | L tokens of a window | D numbers of a token
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mimscale.errors import ConfigError
from mimscale.evaluate.weights import load_model
from mimscale.store.manifest import Manifest
from mimscale.train.build import build_pretrain, build_segmenter
from mimscale.train.config import FinetuneConfig, PretrainConfig

Zyx = tuple[int, int, int]


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


def tokens_and_grid(answer: Any, grid: Zyx | None) -> tuple[Tensor, Zyx]:
    """Tokens [B, L, D] of what an encoder answers, and how many lie along Z, Y and X.

    Args:
        answer: of a ViT its tokens [B, L, D] and something more; of an encoder with stages a map [B, D, z, y, x] of
            each, the deepest last: that one counts.
        grid: of a ViT's tokens.
    """
    first, last = answer[0], answer[-1]
    if first.ndim == 3:
        assert grid is not None, "an encoder that answers with tokens has a grid"
        return first, grid
    z, y, x = last.shape[2:]
    return last.flatten(2).transpose(1, 2), (z, y, x)


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


def one_channel_count(manifest: Manifest, indices: NDArray[np.int64], store: Path) -> int:
    """Channels that all of these volumes have.

    Raises:
        ConfigError: they differ.
    """
    channels = manifest.column("shape")[indices][:, 0]
    counts = {int(value): int((channels == value).sum()) for value in np.unique(channels)}
    if len(counts) > 1:
        said = ", ".join(f"{volumes} with {count}" for count, volumes in counts.items())
        raise ConfigError(f"{store}: volumes have different numbers of channels ({said}); choose some with filter=")
    return next(iter(counts))


def refuse_other_spacing(
    manifest: Manifest,
    indices: NDArray[np.int64],
    store: Path,
    trained_mm: Sequence[float] | None,
    max_ratio: float,
) -> None:
    """Refuse volumes whose voxels are of another size than those that the weights were trained on.

    Args:
        manifest: of the store.
        indices: rows of the volumes.
        store: what the message calls them.
        trained_mm: [Z, Y, X] of the contract; None where it does not say.
        max_ratio: how far the two may lie apart along each axis.

    Raises:
        ConfigError: some volumes do, and nothing resamples them.
    """
    if not trained_mm:
        return
    spacing_mm = manifest.column("spacing_mm")[indices]
    ratio = spacing_mm / np.asarray(trained_mm, dtype=np.float64)
    far = np.flatnonzero((np.maximum(ratio, 1 / ratio) > max_ratio).any(axis=1))
    if len(far):
        first = int(indices[far[0]])
        has = " x ".join(f"{edge:g}" for edge in manifest.column("spacing_mm")[first])
        trained = ", ".join(f"{edge:g}" for edge in trained_mm)
        raise ConfigError(
            f"{store}: {len(far)} of {len(indices)} volumes have voxels of another size than the weights were trained "
            f"on, [{trained}] mm (volume {manifest.column('id')[first]}: {has} mm): resample them with "
            f"target_spacing_mm=[{trained}], leave them out with filter=, or raise max_spacing_ratio={max_ratio:g}"
        )
