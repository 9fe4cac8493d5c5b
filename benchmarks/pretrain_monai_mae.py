"""A control for the study: MONAI's MaskedAutoEncoderViT pretrained by the plan of one of our runs.

    python benchmarks/pretrain_monai_mae.py RUN_DIR OUT

reads the config of a pretraining run of MAE, and trains MONAI's network on the same crops in the same order, with the
same optimizer, rates, batch, number of steps, architecture, mask ratio and loss. OUT becomes a folder of weights that
`init_from` takes, so whether an effect, or its absence, is due to our encoder, masks or transfer can be seen.

What is not ours there: blocks, positions, initial weights, the drawing of masks (torch's generator on the CPU), and a
class token. Our encoder has none, so it is left behind; and MONAI's positions come over as a trained table, so the
fine-tuning needs model.positions=learned.
"""

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from monai_mae import monai_network
from torch import Tensor, nn

from mimscale.console import say
from mimscale.errors import ConfigError, MimscaleError
from mimscale.models.monai_names import from_monai
from mimscale.models.reconstruction import counted_numbers, patch_target, sample_error
from mimscale.models.transfer import save_weights
from mimscale.stream.batch import Batch
from mimscale.stream.device import normalise
from mimscale.train.config import PretrainConfig, load_run_config
from mimscale.train.optim import adamw, group_rate
from mimscale.train.training_data import TrainingData
from mimscale.world import World

# Of the whole network, what is no part of an encoder: the decoder, its token and positions.
DECODER = re.compile(r"decoder_|mask_tokens")
LOG_EVERY_STEPS = 50


class MonaiMae(nn.Module):
    """MONAI's network, with the loss that it leaves to its user.

    B batch | C channels | L patches a crop | P numbers a patch
    """

    def __init__(self, config: PretrainConfig, channels: int) -> None:
        """Raises ConfigError where the run has what MONAI's network cannot do."""
        super().__init__()
        _check(config)
        self.config = config
        self.network = monai_network(config, channels)

    def forward(self, image: Tensor, valid: Tensor) -> Tensor:
        """[B, C, Z, Y, X] and bool [B, 1, Z, Y, X] -> [] our loss on the patches that it hid."""
        prediction, hidden = self.network(image)  # [B, L, P], int [B, L]
        patch, target = self.config.patch_voxels, self.config.mae
        weight = counted_numbers(valid.expand_as(image), hidden.bool(), patch)
        return sample_error(prediction, patch_target(image, target, patch), weight, target).mean()

    def encoder_tensors(self) -> dict[str, Tensor]:
        """The encoder under the names of MONAI's ViT: without the class token, and with the last norm's own name."""
        norm = f"blocks.{self.config.model.depth}."
        return {
            name.replace(norm, "norm.", 1) if name.startswith(norm) else name: value
            for name, value in self.network.state_dict().items()
            if not DECODER.match(name) and name != "cls_token"
        }


def _check(config: PretrainConfig) -> None:
    wrong = [
        f"{key}={value!r}: MONAI's masked autoencoder can do {able} only"
        for key, value, able in (
            ("method", config.method, "mae"),
            ("mask.style", config.mask.style, "random"),
            ("mask.unit_voxels", config.mask.unit_voxels, None),
            ("mask.ratio_range", config.mask.ratio_range, None),
            ("mask.predicted_share", config.mask.predicted_share, 1.0),
            ("mask.repeats", config.mask.repeats, 1),
            ("mae.loss_on", config.mae.loss_on, "masked"),
            ("model.mlp", config.model.mlp, "gelu"),
            ("model.layer_scale", config.model.layer_scale, None),
            ("exclude_overlay", config.exclude_overlay, None),
        )
        if value != able
    ]
    if config.micro_batch != config.global_batch:
        wrong.append(f"micro_batch={config.micro_batch}: the control has no accumulation, make it the global batch")
    if wrong:
        raise ConfigError("; ".join(wrong))


def train(config: PretrainConfig, model: MonaiMae, batches: Iterable[Batch]) -> list[float]:
    """Train by the plan of `config`; the loss of every step."""
    optimizer = adamw(model, config.optim, config.model.depth)
    losses = []
    for step, batch in zip(range(config.steps), batches, strict=False):  # the loader never ends
        loss = model(*normalise(batch))
        loss.backward()
        if config.engine.clip_grad_norm:
            nn.utils.clip_grad_norm_(model.parameters(), config.engine.clip_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = group_rate(group, config.optim, step, config.steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % LOG_EVERY_STEPS == 0 or step + 1 == config.steps:
            recent = losses[-LOG_EVERY_STEPS:]
            say(f"step {step + 1}/{config.steps}  loss {sum(recent) / len(recent):.4f}")
    return losses


def pretrain(run_dir: Path, out: Path) -> list[float]:
    """Train MONAI's network by the plan of a run, and write its encoder to a folder; the loss of every step.

    Raises:
        MimscaleError: a run or a store that cannot be read, or a plan that MONAI's network cannot follow.
    """
    config = load_run_config(run_dir)
    if not isinstance(config, PretrainConfig):
        raise ConfigError(f"{run_dir}: a run of {config.kind}, expected one of pretraining")
    torch.manual_seed(config.seed)
    data = TrainingData(config, None)
    model = MonaiMae(config, data.channels)
    with data.loader(World(), 0) as batches:
        losses = train(config, model, batches)
    imported = from_monai(
        model.encoder_tensors(),
        crop_voxels=config.crop_voxels,
        patch_voxels=config.patch_voxels,
        heads=config.model.heads,
        axes="zyx",
    )
    contract: dict[str, Any] = data.contract(config.steps, "fp32")
    contract |= {"model": imported.model, "method": "mae", "imported_from": "MONAI's MaskedAutoEncoderViT"}
    save_weights(out, imported.tensors, contract)
    say(f"{out}: fine-tune from it by init_from={out} model.positions=learned")
    return losses


def main(argv: list[str]) -> int:
    """The command line above; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, help="of a pretraining run of ours with MAE, in a study nodes/pretrain-*")
    parser.add_argument("out", type=Path, help="folder for the weights")
    arguments = parser.parse_args(argv)
    try:
        pretrain(arguments.run_dir, arguments.out)
    except MimscaleError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
