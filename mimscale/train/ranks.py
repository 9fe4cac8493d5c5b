"""The processes of a run as one: objects and sums that all of them share.

Everything here but `is_first` is a collective: every rank calls it, in the same order.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from mimscale.errors import MimscaleError
from mimscale.world import World

T = TypeVar("T")


class PendingSum:
    """Sums over the ranks that are under way; asking for them a step later costs no wait."""

    def __init__(self, names: list[str], values: Tensor) -> None:
        self._names = names
        self._values = values
        self._work = distributed.all_reduce(values, async_op=True)

    def wait(self) -> dict[str, float]:
        """Name -> sum over all ranks: the same on every rank."""
        assert self._work is not None
        self._work.wait()
        return dict(zip(self._names, self._values.tolist(), strict=True))


class Ranks:
    """All ranks of a run, after they have joined one process group.

    Args:
        world: this process's place.
        device: this rank's device.
    """

    def __init__(self, world: World, device: torch.device) -> None:
        self.world = world
        self.device = device
        # Python objects travel over gloo on the CPU, so that agreeing does not make the GPU wait.
        self._cpu_group = distributed.new_group(backend="gloo") if device.type == "cuda" else None

    @property
    def is_first(self) -> bool:
        """True on the one rank that writes what all share."""
        return self.world.is_first

    def gather(self, item: T) -> list[T]:
        """One picklable object of every rank, in rank order, on every rank."""
        items: list[Any] = [None] * self.world.size
        distributed.all_gather_object(items, item, group=self._cpu_group)
        return items

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
        tensors = [torch.as_tensor(value, dtype=torch.float64).to(self.device) for value in values.values()]
        return PendingSum(list(values), torch.stack(tensors))
