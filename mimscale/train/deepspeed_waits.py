"""What DeepSpeed 0.19 lets the host wait for in every step and need not, replaced by what the device does by itself.

Three kinds: a question about a number that the device has, a number that is made on the host and copied to the device
from memory that is not page-locked, and a whole device that is waited for where one stream has to wait for another.
"""

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from deepspeed.runtime.zero import partition_parameters, stage3, stage_1_and_2
from torch import Tensor, distributed

_BACKWARD_1_AND_2 = stage_1_and_2.DeepSpeedZeroOptimizer.independent_gradient_partition_epilogue
_BACKWARD_3 = stage3.DeepSpeedZeroOptimizer_Stage3.independent_gradient_partition_epilogue
_STEP_3 = stage3.DeepSpeedZeroOptimizer_Stage3._post_step


def let_no_step_wait() -> None:
    """Replace them all, in this process. What is done once or in a checkpoint is left as it is."""
    for stage in (stage_1_and_2, stage3):
        # Unasked, the norm of gradients that are not finite is not finite either; see `Engine._leave_out`.
        stage.is_invalid_grad_norm = lambda norm: False
        stage.mask_nan_or_inf_with_val_inplace = _mark_not_finite
    stage3.DeepSpeedZeroOptimizer_Stage3.get_grad_norm_direct = _norm_of_pieces
    stage_1_and_2.DeepSpeedZeroOptimizer.independent_gradient_partition_epilogue = _end_backward_1_and_2
    stage3.DeepSpeedZeroOptimizer_Stage3.independent_gradient_partition_epilogue = _end_backward_3
    stage3.DeepSpeedZeroOptimizer_Stage3._post_step = _end_step_3


class _Accelerator:
    """DeepSpeed's accelerator with some of its functions replaced."""

    def __init__(self, accelerator: Any, **replaced: Callable[..., Any]) -> None:
        self._accelerator = accelerator
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)


@contextlib.contextmanager
def _accelerator_of(module: ModuleType, **replaced: Callable[..., Any]) -> Iterator[Any]:
    """Inside the block a module of DeepSpeed sees another accelerator; returns the one that it has."""
    get_accelerator = module.get_accelerator
    accelerator = get_accelerator()
    module.get_accelerator = lambda: _Accelerator(accelerator, **replaced)  # type: ignore[attr-defined]
    try:
        yield accelerator
    finally:
        module.get_accelerator = get_accelerator  # type: ignore[attr-defined]


def _end_backward_1_and_2(optimizer: Any) -> None:
    """Where the host would wait for the whole device, the stream of the step waits for that of the reductions.

    What comes next works on the gradients, and in memory that is given up here, in the stream of the step.
    """

    def in_order() -> None:
        accelerator.current_stream().wait_stream(optimizer.reduction_stream)

    with _accelerator_of(stage_1_and_2, synchronize=in_order) as accelerator:
        _BACKWARD_1_AND_2(optimizer)


def _end_backward_3(optimizer: Any) -> None:
    """The same, where the host would wait for the stream of the reductions."""
    with _accelerator_of(stage3, resolves_data_dependency=lambda: True) as accelerator:
        _BACKWARD_3(optimizer)
    if not accelerator.resolves_data_dependency():
        accelerator.current_stream().wait_stream(optimizer.reduce_and_partition_stream)


def _end_step_3(optimizer: Any, timer_names: set[str]) -> None:
    """Where the host would wait for the whole device, after the small weights that stay whole have been gathered.

    Nothing else puts the stream that gathers the other weights, in the next forward pass, behind the update.
    """
    with _accelerator_of(partition_parameters, synchronize=lambda: None) as accelerator:
        _STEP_3(optimizer, timer_names)
    if not accelerator.resolves_data_dependency():
        gathers = optimizer.parameter_offload._DeepSpeedZeRoOffload__allgather_stream
        gathers.wait_stream(accelerator.current_stream())


def _mark_not_finite(norm: Tensor, device: torch.device | None = None, val: float = -1.0) -> None:
    # DeepSpeed's own takes -1 as a tensor on the device, and masked_fill_ makes the host wait to read it.
    norm.masked_fill_(~norm.isfinite(), val)


def _norm_of_pieces(optimizer: Any, gradients: list[Tensor], params: list[Tensor], norm_type: float = 2) -> Tensor:
    """Stage 3's norm of a part of the gradients, in fp64. DeepSpeed's own copies a -1 to the device."""
    assert norm_type == 2
    norms = [torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in gradients]
    squares = torch.stack(norms).square().sum()
    distributed.all_reduce(squares, group=optimizer._get_param_partition_group(params[0]))
    return squares.sqrt()
