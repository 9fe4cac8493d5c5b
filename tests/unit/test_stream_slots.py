"""Slots of shared memory: taken by a worker, freed by the last tensor of the trainer."""

from collections.abc import Iterator
from multiprocessing import get_context

import numpy as np
import pytest
import torch

from mimscale.stream import slots as slots_module
from mimscale.stream.slots import MappedSlots, Slot, Slots, tensor_of


@pytest.fixture
def mapped() -> Iterator[MappedSlots]:
    slots = MappedSlots(get_context("fork"), workers=2)
    yield slots
    slots.close()


@pytest.fixture
def slots(mapped: MappedSlots) -> Slots:
    return Slots(mapped.loader, 1, mapped.taken)


def sent(slots: Slots, slot: Slot, values: list[int]) -> torch.Tensor:
    """What the trainer gets when a worker sends these values."""
    here = slot.memory[: 2 * len(values)].view(torch.int16)
    here[:] = torch.tensor(values)
    return tensor_of(slots.reference(slot, here))


def test_a_slot_is_free_when_the_last_view_of_its_tensor_is_gone(mapped: MappedSlots, slots: Slots) -> None:
    first = slots.take(6)
    tensor = sent(slots, first, [1, 2, 3])
    view = tensor[1:]
    array = tensor.numpy()
    del tensor
    assert slots.take(6) is not first
    assert view.tolist() == [2, 3]
    del view
    assert sum(mapped.taken) == 2
    del array
    assert slots.take(6) is first


def test_a_slot_that_the_trainer_knows_is_sent_by_its_number_alone(slots: Slots) -> None:
    slot = slots.take(4)
    assert slots.reference(slot, slot.memory[:4]).memory is not None
    assert slots.reference(slot, slot.memory[:4]).memory is None


def test_a_free_slot_that_is_too_small_gets_other_memory(slots: Slots) -> None:
    slot = slots.take(4)
    assert sent(slots, slot, [1, 2]).tolist() == [1, 2]  # and gone
    assert slots.take(400) is slot
    assert len(slot.memory) == 400
    values = list(range(200))
    assert sent(slots, slot, values).tolist() == values


def test_the_smallest_slot_that_is_large_enough_is_taken(slots: Slots) -> None:
    large, small = slots.take(100), slots.take(10)
    slots.give_back(large)
    slots.give_back(small)
    assert slots.take(8) is small
    assert slots.take(8) is large


def test_a_worker_without_a_free_slot_shares_memory_that_is_used_once(
    slots: Slots, mapped: MappedSlots, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots_module, "_SLOTS_A_WORKER", 1)
    slots.take(4)
    extra = slots.take(4)
    assert extra.number is None
    assert sent(slots, extra, [7, 8]).tolist() == [7, 8]
    slots.give_back(extra)
    assert sum(mapped.taken) == 1


def test_a_tensor_outlives_its_loader(mapped: MappedSlots, slots: Slots) -> None:
    tensor = sent(slots, slots.take(6), [1, 2, 3])
    mapped.close()
    assert tensor.tolist() == [1, 2, 3]
    assert np.array_equal(tensor.numpy(), [1, 2, 3])
