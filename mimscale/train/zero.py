"""Where DeepSpeed 0.19 keeps what it trains: the ranges of each parameter that a rank holds, by ZeRO stage.

Stage 0 keeps everything on every rank in a plain optimizer; stages 1 and 2 cut each parameter group, flattened, into
one range a rank; stage 3 cuts every parameter. All of them step on fp32 tensors with torch's AdamW.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mimscale.train.state import KINDS, Piece

MOMENTS = KINDS[1:]


def adam_state(optimizer: torch.optim.Optimizer, tensor: Tensor) -> dict[str, Tensor]:
    """AdamW's state of one tensor; before the first update the same zeros that AdamW would make."""
    state: dict[str, Tensor] = optimizer.state[tensor]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(tensor, requires_grad=False)
    return state


def _stepped_on(engine: Any, stage: int) -> tuple[torch.optim.Optimizer, list[Tensor]]:
    """torch's optimizer and the tensors that it updates."""
    if stage == 0:
        optimizer = engine.optimizer
        return optimizer, [parameter for group in optimizer.param_groups for parameter in group["params"]]
    inner = engine.optimizer.optimizer
    return inner, engine.optimizer.fp32_partitioned_groups_flat if stage == 3 else (
        engine.optimizer.single_partition_of_fp32_groups
    )


def adam_steps(engine: Any, stage: int) -> int:
    """Updates made so far. It is one number: a step that is skipped is skipped everywhere."""
    optimizer, tensors = _stepped_on(engine, stage)
    return max(int(adam_state(optimizer, tensor)["step"]) for tensor in tensors)


def set_adam_steps(engine: Any, stage: int, steps: int) -> None:
    """Set the number of updates of every tensor."""
    optimizer, tensors = _stepped_on(engine, stage)
    for tensor in tensors:
        adam_state(optimizer, tensor)["step"].fill_(steps)


def held_pieces(engine: Any, stage: int, names: dict[int, str], rank: int) -> Iterator[Piece]:
    """The ranges that this rank's optimizer holds.

    Args:
        engine: DeepSpeed's.
        stage: its ZeRO stage.
        names: id of a parameter -> its name.
        rank: this rank.
    """
    optimizer, _ = _stepped_on(engine, stage)
    if stage == 0:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield _piece(names[id(parameter)], 0, optimizer, parameter, 0, parameter.numel())
    elif stage == 3:
        for parameters in engine.optimizer.fp16_groups:
            for parameter in parameters:
                group, offset, share = engine.optimizer.grad_position[engine.optimizer.get_param_id(parameter)]
                start = rank * share
                elements = min(share, parameter.ds_numel - start)  # the last ranks' shares are padded
                if elements > 0:
                    flat = engine.optimizer.fp32_partitioned_groups_flat[group]
                    yield _piece(names[id(parameter)], start, optimizer, flat, offset, elements)
    else:
        flats = engine.optimizer.single_partition_of_fp32_groups
        for flat, parameters in zip(flats, engine.optimizer.bit16_groups, strict=True):
            for parameter in parameters:
                mapping = parameter._hp_mapping
                if mapping is not None:
                    inside, outside = mapping.hp_fragment_address, mapping.lp_fragment_address
                    yield _piece(names[id(parameter)], outside.start, optimizer, flat, inside.start, inside.numel)


def _piece(
    name: str, start: int, optimizer: torch.optim.Optimizer, tensor: Tensor, offset: int, elements: int
) -> Piece:
    state = adam_state(optimizer, tensor)
    whole = {"weights": tensor.detach(), **{moment: state[moment] for moment in MOMENTS}}
    return Piece(
        name=name,
        start=start,
        tensors={kind: values.view(-1)[offset : offset + elements] for kind, values in whole.items()},
    )


def share_of_copies(pieces: Iterator[Piece], rank: int, world_size: int) -> Iterator[Piece]:
    """The part of a state that every rank holds whole (stage 0) that this rank writes: all write about as much."""
    held = list(pieces)
    total = sum(piece.elements for piece in held)
    first, end = total * rank // world_size, total * (rank + 1) // world_size
    at = 0
    for piece in held:
        low, high = max(first - at, 0), min(end - at, piece.elements)
        if low < high:
            tensors = {kind: values[low:high] for kind, values in piece.tensors.items()}
            yield Piece(name=piece.name, start=piece.start + low, tensors=tensors)
        at += piece.elements


def spread_weights(engine: Any, stage: int) -> None:
    """Bring the model's weights in line with the fp32 ones that were read. A collective."""
    if stage == 3:
        optimizer = engine.optimizer
        optimizer.checkpoint_event_prologue()  # weights that were gathered and kept are given up
        for group, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            optimizer.fp16_partitioned_groups_flat[group].data.copy_(flat.data)
            optimizer._unflatten_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()
    elif stage:
        engine.optimizer.update_lp_params()


def shapes_of(model: nn.Module) -> dict[str, list[int]]:
    """Parameter -> its full shape: ZeRO-3 leaves an empty tensor in its place and the shape in `ds_shape`."""
    return {name: list(getattr(value, "ds_shape", value.shape)) for name, value in model.named_parameters()}
