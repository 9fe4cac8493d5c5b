"""The place that imports DeepSpeed: start, one optimizer step, and the state that a checkpoint holds.

An `Engine` hides ZeRO from the loop: the loop sees a callable model, `backward` and `step`.
"""

import contextlib
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import deepspeed
import torch
from deepspeed.runtime import compiler
from deepspeed.utils import safe_get_full_fp32_param
from safetensors import safe_open
from torch import Tensor, distributed, nn

from mimscale.console import say
from mimscale.errors import LaunchError
from mimscale.models.contract import WEIGHTS_FILE
from mimscale.train.compiled_blocks import compile_blocks, compiles_blocks
from mimscale.train.config import RunConfig, accumulation
from mimscale.train.deepspeed_config import deepspeed_config, sums_micro_batches_in_bf16
from mimscale.train.deepspeed_waits import let_no_step_wait
from mimscale.train.environment import keep_freed_memory, remove_stale_build_locks
from mimscale.train.optim import adamw, group_rate, learning_rate
from mimscale.train.ranks import Ranks
from mimscale.train.state import PartIndex, Piece, SavedState, Snapshot, write_index
from mimscale.train.zero import (
    adam_steps,
    held_pieces,
    set_adam_steps,
    shapes_of,
    share_of_copies,
    spread_weights,
)
from mimscale.world import World


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
            f"rank {world.rank} on {world.node}: DS_ACCELERATOR=cuda, but torch sees no CUDA device here; ask for GPUs "
            "(slurm.gpus_per_node), leave the node out when its GPUs are broken, or set DS_ACCELERATOR=cpu"
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
    else:
        keep_freed_memory()
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints there; standard output is for results
        deepspeed.init_distributed(
            dist_backend="nccl" if kind == "cuda" else "gloo",
            timeout=timedelta(minutes=collective_timeout_min),
            verbose=False,
        )
    device = torch.device("cuda", world.local_rank) if kind == "cuda" else torch.device("cpu")
    return Ranks(world, device, collective_timeout_min=collective_timeout_min)


def import_muon_without_compiler() -> None:
    """Import what DeepSpeed looks into at each start, its Muon optimizer, without torch's compiler.

    A decorator there would have the whole compiler imported, which takes longer than torch, DeepSpeed and mimscale
    together. Nobody here uses Muon, and it works without being compiled.
    """
    original = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        with contextlib.suppress(ImportError):  # another DeepSpeed may have it elsewhere
            importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = original


def leave_ranks() -> None:
    """Leave the process group."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


@contextlib.contextmanager
def joined_ranks(world: World, *, collective_timeout_min: float = 30.0) -> Iterator[Ranks]:
    """The process group of a run, for a block.

    A rank that fails beside others stays in it, and its process has to end. NCCL would have it wait there for the
    others, which are in collectives that it does not take part in any more, and its error would come too late.

    Raises:
        LaunchError: as from `join_ranks`.
    """
    ranks = join_ranks(world, collective_timeout_min=collective_timeout_min)
    try:
        yield ranks
    except BaseException:
        if world.size == 1:
            leave_ranks()
        raise
    leave_ranks()


def choose_kernels(*, deterministic: bool) -> None:
    """Let cuDNN time its convolutions and take the fastest, since shapes stay the same; or kernels that repeat bits."""
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


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
        let_no_step_wait()
        self._stage_0_norm = torch.zeros(())
        if ranks.device.type == "cuda":
            choose_kernels(deterministic=config.engine.deterministic)
        if compiles_blocks(model, config, ranks):
            compile_blocks(model)
        optimizer = adamw(model, config.optim, config.model.layers)
        self._groups = [{key: group[key] for key in ("lr_scale", "is_encoder")} for group in optimizer.param_groups]
        optimizer.register_step_pre_hook(self._leave_out)
        micro_batches = accumulation(config, ranks.world.size)
        if ranks.is_first and sums_micro_batches_in_bf16(self.zero_stage, micro_batches, bf16=self.precision == "bf16"):
            say(
                f"{micro_batches} micro-batches a step: engine.zero_stage=1 sums their gradients in bf16, which loses "
                "digits; engine.zero_stage=2 sums them in fp32 and sends them after each micro-batch"
            )
        tree = deepspeed_config(
            config.engine,
            precision=self.precision,
            micro_batch=config.micro_batch,
            accumulation=micro_batches,
            world_size=ranks.world.size,
        )
        import_muon_without_compiler()
        with contextlib.redirect_stdout(sys.stderr):
            self._deepspeed, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=tree, dist_init_required=False
            )
        self._names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        self._snapshot = Snapshot(ranks.world.rank, pinned=ranks.device.type == "cuda")

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

        The device decides that by itself, and the host learns of it when it reads the norm.
        """
        if self.zero_stage == 0 and self._deepspeed.is_gradient_accumulation_boundary():
            # DeepSpeed does not report the norm of this stage, and clips with numbers that it copies to the device.
            gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
            self._stage_0_norm = nn.utils.get_total_norm(gradients)
            if self._config.engine.clip_grad_norm > 0:
                nn.utils.clip_grads_with_norm_(
                    self.module.parameters(), self._config.engine.clip_grad_norm, self._stage_0_norm
                )
        self._deepspeed.step()

    def _leave_out(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Just before torch's AdamW updates a group, when the norm of all is known.

        Where `found_inf` is 1, its fused kernel changes neither weights nor moments, and the count of updates stays:
        made for gradient scalers, which leave out a step without asking the device.
        """
        norm: Tensor = self._stage_0_norm if self.zero_stage == 0 else self._deepspeed.optimizer._global_grad_norm
        optimizer.found_inf = 1.0 - torch.isfinite(norm).float()  # type: ignore[attr-defined]

    def grad_norm(self) -> Tensor | float:
        """Global gradient norm of the last step, before clipping; not finite where any gradient was not."""
        if self.zero_stage == 0:
            return self._stage_0_norm
        norm: Tensor | float = self._deepspeed.get_global_grad_norm()
        return norm

    def snapshot(self) -> Snapshot:
        """Copy this rank's part of the training state to host memory. A collective.

        The memory is that of the snapshot before, so that one must have been written.
        """
        pieces = self.pieces()
        if self.zero_stage == 0:
            pieces = share_of_copies(pieces, self.ranks.world.rank, self.ranks.world.size)
        steps = adam_steps(self._deepspeed, self.zero_stage)
        self._snapshot.take(pieces, steps, self.full_weights(self._snapshot.full_weights))
        return self._snapshot

    def write_index(self, folder: Path, parts: list[PartIndex]) -> Path:
        """Write down which rank's part holds what."""
        return write_index(folder, parts, shapes_of(self.module))

    def load(self, folder: Path, files: Iterable[str]) -> None:
        """Take over a training state, whatever number of ranks and ZeRO stage saved it. A collective.

        Args:
            folder: a checkpoint's.
            files: those that its manifest names.

        Raises:
            CheckpointError: it belongs to another model, or does not hold what its index says.
        """

        def read() -> None:
            saved = SavedState(folder, files)
            saved.refuse_other_model(shapes_of(self.module))
            saved.fill(self.pieces())
            set_adam_steps(self._deepspeed, self.zero_stage, saved.adam_steps)

        self.ranks.all_do(read)
        spread_weights(self._deepspeed, self.zero_stage)
        self._load_frozen(folder / WEIGHTS_FILE)

    def _load_frozen(self, file: Path) -> None:
        """Read weights that no optimizer steps on: the training state does not hold them."""
        frozen = {name: value for name, value in self.module.named_parameters() if not value.requires_grad}
        if not frozen:
            return
        with safe_open(file, framework="pt", device="cpu") as saved, torch.no_grad():
            for name, parameter in frozen.items():
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.zero_stage == 3):
                    if self.zero_stage < 3 or self.ranks.is_first:
                        parameter.copy_(saved.get_tensor(name).reshape(parameter.shape))

    def pieces(self) -> Iterator[Piece]:
        """The ranges of the training state that this rank holds."""
        return held_pieces(self._deepspeed, self.zero_stage, self._names, self.ranks.world.rank)

    def full_weights(self, into: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Copies of all weights in fp32 on the CPU, on rank 0. A collective under ZeRO-3 and in bf16.

        Args:
            into: those of an earlier call, or an empty dict: they are written over. A GPU then copies by itself, into
                page-locked memory, and the caller waits for it.
        """
        weights = {} if into is None else into
        goes_on = into is not None and self.ranks.device.type == "cuda"
        shapes, is_whole = shapes_of(self.module), self.zero_stage < 3 and self.precision == "fp32"
        for name, parameter in self.module.named_parameters():
            # What is not trained has no fp32 copy, and ZeRO-3 has it in pieces.
            frozen = self.zero_stage == 3 and not parameter.requires_grad
            with deepspeed.zero.GatheredParameters([parameter], enabled=frozen):
                full = None if is_whole or not parameter.requires_grad else safe_get_full_fp32_param(parameter)
                if self.ranks.is_first:
                    exact = (parameter if full is None else full).detach()
                    if name not in weights:
                        weights[name] = torch.empty(shapes[name], pin_memory=goes_on)
                    weights[name].copy_(exact.reshape(shapes[name]), non_blocking=goes_on)
        return weights


def prebuild() -> None:
    """Let DeepSpeed build its shared-memory op now, in one process, instead of in all ranks of the first run."""
    join_ranks(World())
    leave_ranks()


if __name__ == "__main__":
    prebuild()
