"""Blocks of a network that are compiled one by one: whether, and how."""

import importlib.util
import os
import shutil
from collections.abc import Sequence

import torch
from torch import nn

from mimscale.console import say
from mimscale.errors import ConfigError
from mimscale.train.config import RunConfig
from mimscale.train.ranks import Ranks

# Shapes that blocks of one class may be compiled for. Beyond torch's own 8 the next ones would run as they are; those
# of a U-Net differ at every stage, in training and in validation.
MOST_SHAPES = 64
_C_COMPILERS = ("cc", "gcc", "clang")  # Triton builds its launchers with one


def compiles_blocks(model: nn.Module, config: RunConfig, ranks: Ranks) -> bool:
    """Whether a run compiles its blocks: as its config says, and where that is null, on CUDA if nothing is in the way.

    What is in the way is said in one line. On a CPU it gained nothing (benchmarks/README.md).
    """
    wanted = config.engine.compile_blocks
    if wanted is not None:
        return wanted
    if ranks.device.type != "cuda":
        return False
    reason = _in_the_way(model, config)
    if reason is not None and ranks.is_first:
        say(f"blocks are not compiled: {reason}")
    return reason is None


def _in_the_way(model: nn.Module, config: RunConfig) -> str | None:
    if not _kinds(model):
        return f"{type(model.encoder).__name__} does not say which of its modules are compiled one by one"
    changes = config.network.changing_shapes(config)
    if changes is not None:
        return f"{changes}, so that each number of visible patches would be compiled anew"
    if config.engine.zero_stage == 3:
        return "engine.zero_stage=3 gathers weights inside of a block, where compiled code would break off"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    wanted = os.environ.get("CC")
    if not any(map(shutil.which, [wanted] if wanted else _C_COMPILERS)):
        return f"no C compiler is found here ({wanted or ', '.join(_C_COMPILERS)}); CC names one"
    return None


def compile_blocks(model: nn.Module, *, backend: str = "inductor") -> None:
    """Compile each block (`repeated` of its encoder) in its place: the names of its weights stay.

    Blocks of one shape share their code, so it is built once. What cannot be compiled here (no compiler, an operation
    that it does not know) runs as it is, and torch says so in a warning.

    Raises:
        ConfigError: the encoder has no such blocks.
    """
    kinds = _kinds(model)
    if not kinds:
        raise ConfigError(
            f"engine.compile_blocks=true: {type(model.encoder).__name__} does not say which of its modules are "
            "compiled one by one; give it `repeated`, a tuple of their classes, or leave the key out"
        )
    torch._dynamo.config.suppress_errors = True
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_SHAPES)
    # Else the backward pass is compiled when it first runs, and what fails there ends the run.
    torch._functorch.config.force_non_lazy_backward_lowering = True
    inside: set[nn.Module] = set()  # of a block that is compiled as a whole
    for module in model.modules():  # a module comes before what is inside of it
        if isinstance(module, kinds) and module not in inside:
            module.compile(dynamic=False, backend=backend)
            inside.update(module.modules())


def _kinds(model: nn.Module) -> tuple[type[nn.Module], ...]:
    kinds: Sequence[type[nn.Module]] = getattr(model.encoder, "repeated", ())
    return tuple(kinds)
