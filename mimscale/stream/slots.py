"""Shared memory that a loader worker fills and the trainer reads, used again and again.

Fresh shared memory costs a fault and a zeroed page for each 4 KB in the worker, another fault in the trainer, and a
round trip for its file descriptor: together half as much as decoding what it holds. So a worker keeps what it has
shared, and the trainer keeps it mapped: a message names the slot. The slot is free again when the last tensor on it is
gone, be it a view that a trainer has kept.
"""

import itertools
import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_SLOTS_A_WORKER = 256  # a byte each; a worker that needs more at once shares fresh memory, as slowly as that is
_FREE, _TAKEN = 0, 1


@dataclass(eq=False)
class Slot:
    """A piece of shared memory of a worker."""

    memory: Tensor  # [bytes] uint8
    number: int | None  # among the slots of all workers; None: used once
    is_mapped: bool = False  # the trainer has it


class Reference(NamedTuple):
    """What a message says of a tensor that lies in a slot."""

    loader: int
    number: int | None
    memory: Tensor | None  # where the trainer has not mapped the slot yet
    shape: tuple[int, ...]
    dtype: str


class Slots:
    """The slots of one worker. It takes them; the trainer gives them back."""

    def __init__(self, loader: int, worker: int, taken: Any) -> None:
        """Share nothing yet; `taken` is that of the trainer's `MappedSlots`."""
        self._loader, self._first, self._taken = loader, worker * _SLOTS_A_WORKER, taken
        self._slots: list[Slot] = []

    def take(self, num_bytes: int) -> Slot:
        """Memory of at least `num_bytes`; it holds what it held before, zeros at first."""
        free = [slot for slot in self._slots if self._taken[slot.number] == _FREE]
        fits = [slot for slot in free if len(slot.memory) >= num_bytes]
        if fits:
            slot = min(fits, key=lambda slot: len(slot.memory))
        elif free:
            slot = free[0]
            slot.memory, slot.is_mapped = _shared_memory(num_bytes), False
        elif len(self._slots) < _SLOTS_A_WORKER:
            slot = Slot(_shared_memory(num_bytes), self._first + len(self._slots))
            self._slots.append(slot)
        else:
            return Slot(_shared_memory(num_bytes), None)
        self._taken[slot.number] = _TAKEN
        return slot

    def give_back(self, slot: Slot) -> None:
        """Free a slot that was not sent."""
        if slot.number is not None:
            self._taken[slot.number] = _FREE

    def reference(self, slot: Slot, tensor: Tensor) -> Reference:
        """What to send for a tensor that lies at the start of a slot; call it once, in the order of the messages."""
        memory, slot.is_mapped = None if slot.is_mapped else slot.memory, True
        return Reference(self._loader, slot.number, memory, tuple(tensor.shape), str(tensor.numpy().dtype))


class MappedSlots:
    """All slots of a loader's workers, as the trainer sees them."""

    def __init__(self, context: Any, workers: int) -> None:
        """Make what workers of the multiprocessing `context` need: `loader` and `taken`."""
        self.loader = next(_numbers)
        self.taken = context.RawArray("B", workers * _SLOTS_A_WORKER)
        self._memory: dict[int, NDArray[np.uint8]] = {}
        _open[self.loader] = self

    def tensor(self, reference: Reference) -> Tensor:
        """The tensor of a message; the slot is free when nothing uses its memory any more."""
        if reference.memory is not None:
            memory: NDArray[np.uint8] = reference.memory.numpy()
            if reference.number is not None:
                self._memory[reference.number] = memory
        else:
            assert reference.number is not None
            memory = self._memory[reference.number]
        dtype = np.dtype(reference.dtype)
        num_bytes = int(np.prod(reference.shape)) * dtype.itemsize
        array = memory[:num_bytes].view(dtype).reshape(reference.shape)
        if reference.number is not None:
            # The tensor's storage holds the array, and so does every view of the tensor.
            weakref.finalize(array, self.taken.__setitem__, reference.number, _FREE).atexit = False
        return torch.from_numpy(array)

    def close(self) -> None:
        """Forget the mapped memory; tensors on it stay valid."""
        _open.pop(self.loader, None)


def tensor_of(reference: Reference) -> Tensor:
    """The tensor that a message to this process speaks of."""
    return _open[reference.loader].tensor(reference)


# Messages are unpacked by `pickle`, on any thread of the trainer: this is how they find their loader.
_open: dict[int, MappedSlots] = {}
_numbers = itertools.count()


def _shared_memory(num_bytes: int) -> Tensor:
    storage = torch.UntypedStorage._new_shared(num_bytes, device="cpu")  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=torch.uint8).set_(storage)
