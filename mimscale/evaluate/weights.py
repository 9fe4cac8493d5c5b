"""The network of a run, with the weights of one of its checkpoints, ready to answer."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mimscale.config import config_tree
from mimscale.console import say
from mimscale.errors import CheckpointError, ConfigError
from mimscale.models.transfer import load_weights
from mimscale.store.layout import StoreInfo
from mimscale.train.build import build_pretrain, build_segmenter
from mimscale.train.config import FinetuneConfig, PretrainConfig


def load_model(
    run_config: PretrainConfig | FinetuneConfig, tag: Path, channels: int, device: torch.device
) -> tuple[nn.Module, dict[str, Any]]:
    """Build the run's network, load a checkpoint's weights strictly; the network in eval mode, and its contract.

    Raises:
        CheckpointError: the weights do not fit the network of the run's config.
    """
    tensors, contract = load_weights(tag)
    if contract["channels"] != channels:
        raise ConfigError(
            f"{tag}: trained on {contract['channels']} channel(s), the store has {channels}; give the store of the run"
        )
    model: nn.Module = (
        build_pretrain(run_config, channels)
        if isinstance(run_config, PretrainConfig)
        else build_segmenter(run_config, channels)
    )
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{tag}: its weights are not those of config.yaml's network: {error}") from None
    return model.to(device).eval(), contract


def check_contract(contract: dict[str, Any], info: StoreInfo, store: Path, overlay: str | None) -> None:
    """Refuse a store whose voxels or labels mean something else than those that the weights were trained on.

    Raises:
        ConfigError: with both values.
    """
    here = config_tree(info.intensity)
    if contract["intensity"] != here:
        raise ConfigError(
            f"{store}: intensities are normalised by {here}, the weights were trained with {contract['intensity']}; "
            "evaluate on a store with the same intensity contract"
        )
    if contract.get("modality") != info.modality:
        say(f"the weights were trained on modality {contract.get('modality')}, this store holds {info.modality}")
    if overlay is None:
        return
    if overlay not in info.overlays:
        known = ", ".join(info.overlays) or "none"
        raise ConfigError(f"{store}: no overlay {overlay!r}; there are: {known}")
    classes = list(info.overlays[overlay].class_names)
    if list(contract["class_names"] or []) != classes:
        raise ConfigError(
            f"{store}: overlay {overlay!r} has classes {classes}, the weights were trained on {contract['class_names']}"
        )


def choose_device(name: str) -> torch.device:
    """The device that a user means.

    Raises:
        ConfigError: cuda was asked for and is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: this machine has no CUDA device that PyTorch sees; use device=cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


@contextmanager
def cpu_threads(wanted: int | None) -> Iterator[None]:
    """Compute on this many threads inside the block; None: on all cores that the process may use.

    Training runs a process a core and one thread each (OMP_NUM_THREADS=1); evaluation is one process.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(wanted or len(os.sched_getaffinity(0)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
