"""The only place that knows DeepSpeed: start, one optimizer step, save and load.

An `Engine` hides ZeRO from the loop: the loop sees a callable model, `backward` and `step`.
"""

import contextlib
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, distributed, nn

from mimscale import durable
from mimscale.errors import LaunchError
from mimscale.train.config import RunConfig, accumulation
from mimscale.train.deepspeed_config import deepspeed_config
from mimscale.train.environment import remove_stale_build_locks
from mimscale.train.optim import group_rate, learning_rate, parameter_groups
from mimscale.train.ranks import Ranks
from mimscale.world import World

ENGINE_FOLDER = "engine"


def ignore_known_warnings() -> None:
    """Silence what nobody here can change.

    DeepSpeed 0.19 calls collectives by names that torch has renamed, and imports torch's compiler, which uses what
    torch itself deprecates.
    """
    warnings.filterwarnings("ignore", "`torch.jit.script_method` is deprecated", DeprecationWarning)
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", f"`torch.distributed.{name}` is deprecated", FutureWarning)


ignore_known_warnings()


def join_ranks(world: World, *, collective_timeout_min: float = 30.0) -> Ranks:
    """Join the process group of the run.

    Raises:
        LaunchError: DS_ACCELERATOR asks for an accelerator that this machine does not have.
    """
    wanted = os.environ.get("DS_ACCELERATOR")
    has_cuda = torch.cuda.is_available()
    if wanted == "cuda" and not has_cuda:
        raise LaunchError(
            "DS_ACCELERATOR=cuda, but torch sees no CUDA device here; set DS_ACCELERATOR=cpu to use the CPU"
        )
    if wanted == "cuda" and world.local_rank >= torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        raise LaunchError(
            f"rank {world.rank} on {world.node}: is number {world.local_rank} of its node, but sees "
            f"{torch.cuda.device_count()} GPU(s) (CUDA_VISIBLE_DEVICES={visible}); every rank must see all GPUs of its "
            "node: ask for them by node (--gpus-per-node or --gres), not by task"
        )
    os.environ["DS_ACCELERATOR"] = kind = wanted or ("cuda" if has_cuda else "cpu")
    os.environ.update(world.environment())
    # With it DeepSpeed maps 69 MB of /dev/shm a rank for an all-reduce that only inference uses, and leaves them there.
    os.environ.pop("LOCAL_SIZE", None)
    if os.access(sys.prefix, os.W_OK):
        # DeepSpeed builds an op on first use. Environments that share the default cache rebuild it in turns.
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    if "TORCH_EXTENSIONS_DIR" in os.environ:
        remove_stale_build_locks(Path(os.environ["TORCH_EXTENSIONS_DIR"]))
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if kind == "cuda":
        torch.cuda.set_device(world.local_rank)
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints there; standard output is for results
        deepspeed.init_distributed(
            dist_backend="nccl" if kind == "cuda" else "gloo",
            timeout=timedelta(minutes=collective_timeout_min),
            verbose=False,
        )
    return Ranks(world, torch.device("cuda", world.local_rank) if kind == "cuda" else torch.device("cpu"))


def leave_ranks() -> None:
    """Leave the process group."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


class Engine:
    """A model under DeepSpeed ZeRO, with AdamW.

    Args:
        model: fp32 weights, the same on every rank.
        config: the run's config.
        ranks: the processes that share the work.
    """

    def __init__(self, model: nn.Module, config: RunConfig, ranks: Ranks) -> None:
        self.ranks = ranks
        self.zero_stage: int = config.engine.zero_stage
        self.precision = self._precision(config)
        self._config = config
        self._stage_0_norm = 0.0
        if config.engine.deterministic and ranks.device.type == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        groups = parameter_groups(model, config.optim, config.model.depth)
        self._groups = [{key: group[key] for key in ("lr_scale", "is_encoder")} for group in groups]
        optimizer = torch.optim.AdamW(groups, lr=config.optim.lr, betas=config.optim.betas)
        if self.zero_stage == 0:
            optimizer.register_step_pre_hook(self._leave_out_stage_0)
        tree = deepspeed_config(
            config.engine,
            precision=self.precision,
            micro_batch=config.micro_batch,
            accumulation=accumulation(config, ranks.world.size),
            world_size=ranks.world.size,
        )
        with contextlib.redirect_stdout(sys.stderr):
            self._deepspeed, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=tree, dist_init_required=False
            )
        self._files = _CheckpointFiles(self._deepspeed.checkpoint_engine)
        self._deepspeed.checkpoint_engine = self._files
        # DeepSpeed copies a recovery script beside each save, outside the calls that we watch for a full disk.
        self._deepspeed._copy_recovery_script = lambda save_path: None

    def _precision(self, config: RunConfig) -> Literal["fp32", "bf16"]:
        if config.engine.precision == "auto":
            return "bf16" if self.ranks.device.type == "cuda" and self.zero_stage > 0 else "fp32"
        return config.engine.precision

    @property
    def module(self) -> nn.Module:
        """The model itself. Under ZeRO-3 its weights are sharded outside of forward and backward."""
        module = self._deepspeed.module
        assert isinstance(module, nn.Module)
        return module

    def __call__(self, *inputs: Any) -> Any:
        """The model's forward."""
        return self._deepspeed(*inputs)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """No gradients, no dropout; training mode comes back afterwards."""
        self._deepspeed.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._deepspeed.train()

    def backward(self, loss: Tensor) -> None:
        """Gradients of one micro-batch; DeepSpeed divides by the number of micro-batches and reduces at the last.

        A loss that is not finite makes every gradient NaN, so that the norm of the reduced gradient tells all ranks. An
        infinite voxel alone would not: the gradient of an L1 loss is a sign. Times 1 changes no bit, and neither asks
        the device nor waits for it.
        """
        self._deepspeed.backward(loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan))

    def seed_micro_batch(self, step: int, micro_index: int) -> None:
        """Seed dropout and drop-path from (seed, step, micro-batch, rank), so that no generator needs saving."""
        index = (
            step * accumulation(self._config, self.ranks.world.size) + micro_index
        ) * self.ranks.world.size + self.ranks.world.rank
        torch.manual_seed((self._config.seed << 40) + index)

    def set_learning_rate(self, step: int) -> float:
        """Set every group's rate for `step`; returns the base rate."""
        rate = learning_rate(self._config.optim, step, self._config.steps)
        groups = self._deepspeed.optimizer.param_groups
        for group, ours in zip(groups, self._groups, strict=True):
            group["lr"] = group_rate(ours, self._config.optim, step, self._config.steps)
        return rate

    def step(self) -> None:
        """End one micro-batch: the last of a step updates the weights, unless the global gradient norm is not finite.

        DeepSpeed looks itself at stages 1-3, where it reads the norm before the update. At stage 0 nobody does, so we
        read it before the update instead of after: as many waits for the device, but the host launches the update's
        kernels only after this one.
        """
        if self.zero_stage == 0 and self._deepspeed.is_gradient_accumulation_boundary():
            # DeepSpeed does not report the norm of this stage. Here the gradients are averaged and not yet clipped.
            gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
            self._stage_0_norm = float(nn.utils.get_total_norm(gradients))
        self._deepspeed.step()

    def _leave_out_stage_0(self, *_: Any) -> None:
        """Just before an update at stage 0: without gradients AdamW leaves weights and moments alone."""
        if not math.isfinite(self._stage_0_norm):
            for parameter in self.module.parameters():
                parameter.grad = None

    def grad_norm(self) -> float:
        """Global gradient norm of the last step, before clipping; not finite where its update was left out."""
        return float(self._stage_0_norm if self.zero_stage == 0 else self._deepspeed.get_global_grad_norm())

    def save(self, folder: Path, step: int) -> list[OSError]:
        """Write this rank's part of weights and optimizer state into `folder`. A collective.

        Returns:
            The write errors of this rank. They are returned, not raised: a rank that left here would leave the others
            waiting inside DeepSpeed.
        """
        self._files.errors.clear()
        self._deepspeed.save_checkpoint(
            str(folder),
            tag=ENGINE_FOLDER,
            # Without this key DeepSpeed cannot convert the checkpoint to another number of ranks later.
            client_state={"universal_checkpoint_info": {}, "iteration": step},
            save_latest=False,
        )
        return list(self._files.errors)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, on the same number of ranks and the same ZeRO stage. A collective."""
        loaded, _ = self._deepspeed.load_checkpoint(str(folder), tag=ENGINE_FOLDER, load_lr_scheduler_states=False)
        assert loaded is not None, f"DeepSpeed did not load {folder}, whose manifest verified"

    def full_weights(self) -> dict[str, Tensor]:
        """All weights in fp32 on the CPU, on rank 0; empty elsewhere. A collective under ZeRO-3 and in bf16."""
        if self.zero_stage < 3 and self.precision == "fp32":
            if not self.ranks.is_first:
                return {}
            return {name: value.detach().cpu() for name, value in self.module.state_dict().items()}
        weights = {}
        for name, parameter in self.module.named_parameters():
            # What is not trained has no fp32 copy, and ZeRO-3 has it in pieces.
            frozen = self.zero_stage == 3 and not parameter.requires_grad
            with deepspeed.zero.GatheredParameters([parameter], enabled=frozen):
                full = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
                if self.ranks.is_first:
                    exact = (parameter if full is None else full).detach().float().cpu()
                    weights[name] = exact.reshape(_shape(parameter)).clone()
        return weights


def _shape(parameter: nn.Parameter) -> torch.Size:
    """A parameter's full shape: ZeRO-3 leaves an empty tensor in its place and the shape in `ds_shape`."""
    shape = getattr(parameter, "ds_shape", parameter.shape)
    assert isinstance(shape, torch.Size)
    return shape


class _CheckpointFiles:
    """DeepSpeed's checkpoint files, flushed to disk, with write errors collected instead of raised."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.errors: list[OSError] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make the folder of the files."""
        try:
            self._inner.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.errors.append(error)

    def save(self, state_dict: Any, path: str) -> None:
        """Write one file and flush it."""
        try:
            self._inner.save(state_dict, path)
            durable.fsync_file(Path(path))
        except OSError as error:
            self.errors.append(error)
        except RuntimeError as error:  # torch reports a failed write of a tensor this way, with the reason in the text
            self.errors.append(OSError(f"{path}: {error}"))


def prebuild() -> None:
    """Let DeepSpeed build its shared-memory op now, in one process, instead of in all ranks of the first run."""
    join_ranks(World())
    leave_ranks()


if __name__ == "__main__":
    prebuild()
