"""The processes of a run as one: objects and sums that all of them share.

Everything here but `is_first` is a collective: every rank calls it, in the same order.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from mimscale.errors import MimscaleError
from mimscale.stream.device import to_device
from mimscale.world import World

T = TypeVar("T")


class PendingSum:
    """Sums over the ranks that are under way; asking for them a step later costs no wait.

    On CUDA they come back to page-locked memory by themselves: to read the device's own copy a step later would be to
    wait for all that the device was given since.
    """

    def __init__(self, names: list[str], values: Tensor) -> None:
        self._names = names
        self._values = values
        self._work = distributed.all_reduce(values, async_op=True)
        self._arrived: torch.cuda.Event | None = None
        if values.is_cuda:
            assert self._work is not None
            self._work.wait()  # orders the copy behind the reduction, on the device
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def wait(self) -> dict[str, float]:
        """Name -> sum over all ranks: the same on every rank."""
        if self._arrived is not None:
            self._arrived.synchronize()
        else:
            assert self._work is not None
            self._work.wait()
        return dict(zip(self._names, self._values.tolist(), strict=True))


class Ranks:
    """All ranks of a run, after they have joined one process group.

    Args:
        world: this process's place.
        device: this rank's device.
        collective_timeout_min: how long a rank waits for another.
    """

    def __init__(self, world: World, device: torch.device, *, collective_timeout_min: float = 30.0) -> None:
        self.world = world
        self.device = device
        # Python objects travel over gloo on the CPU, so that agreeing does not make the GPU wait.
        self._cpu_group: distributed.ProcessGroup | None = None
        if device.type == "cuda":
            # A group of its own does not take over the time of the one that all are in.
            timeout = timedelta(minutes=collective_timeout_min)
            self._cpu_group = distributed.new_group(backend="gloo", timeout=timeout)

    @property
    def is_first(self) -> bool:
        """True on the one rank that writes what all share."""
        return self.world.is_first

    def gather(self, item: T) -> list[T]:
        """One picklable object of every rank, in rank order, on every rank."""
        items: list[Any] = [None] * self.world.size
        distributed.all_gather_object(items, item, group=self._cpu_group)
        return items

    def gather_to_first(self, item: T) -> list[T]:
        """One picklable object of every rank, in rank order, on rank 0; nothing on the others.

        For what grows with the ranks: `gather` brings all of it to all of them.
        """
        items: list[Any] | None = [None] * self.world.size if self.is_first else None
        distributed.gather_object(item, items, dst=0, group=self._cpu_group)
        return items or []

    def first_does(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0; every rank gets its result, or its MimscaleError.

        Without this, an error on rank 0 would leave the others waiting for it.
        """
        items: list[Any] = [None, None]
        if self.is_first:
            try:
                items[0] = action()
            except MimscaleError as error:
                items[1] = error
        distributed.broadcast_object_list(items, src=0, group=self._cpu_group)
        result, problem = items
        if problem is not None:
            raise problem
        return result  # type: ignore[no-any-return]

    def total(self, values: dict[str, Tensor | float]) -> dict[str, Any]:
        """Sums over all ranks: of numbers as floats, of arrays as tensors on the CPU. A name that a rank lacks is 0."""
        own = {name: torch.as_tensor(value, dtype=torch.float64).to(self.device) for name, value in values.items()}
        shapes: dict[str, torch.Size] = {}
        for theirs in self.gather({name: value.shape for name, value in own.items()}):
            shapes |= theirs
        names = sorted(shapes)
        parts = [own.get(name, torch.zeros(shapes[name], dtype=torch.float64, device=self.device)) for name in names]
        flat = torch.cat([part.flatten() for part in parts])
        distributed.all_reduce(flat)
        sums = torch.split(flat.cpu(), [part.numel() for part in parts])
        return {
            name: total.reshape(shapes[name]) if shapes[name] else float(total)
            for name, total in zip(names, sums, strict=True)
        }

    def largest(self, value: float) -> float:
        """The largest of a number that each rank's host knows. Not of the device, so nobody waits for it."""
        found = torch.tensor(value, dtype=torch.float64)
        distributed.all_reduce(found, op=distributed.ReduceOp.MAX, group=self._cpu_group)
        return float(found)

    def all_do(self, action: Callable[[], None]) -> None:
        """Run `action` on every rank; the first MimscaleError of any rank is raised on all of them."""
        problem = None
        try:
            action()
        except MimscaleError as error:
            problem = error
        for found in self.gather(problem):
            if found is not None:
                raise found

    def sum(self, values: dict[str, Tensor | float]) -> PendingSum:
        """Start one small reduction; every rank calls it with the same names."""
        # What the host knows goes over in one copy that it does not wait for.
        known = torch.tensor(
            [0.0 if isinstance(value, Tensor) else value for value in values.values()], dtype=torch.float64
        )
        sums = to_device(known, self.device)
        for place, value in enumerate(values.values()):
            if isinstance(value, Tensor):
                sums[place] = value.detach()
        return PendingSum(list(values), sums)
