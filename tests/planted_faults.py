"""Faults that are planted into one rank of a run before it starts: `run_ranks(words, plant=partial(nan_voxel, 1, 2))`.

Each function is called in the process of every rank with the number of that rank as its last argument.
"""

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fault_injector


def _at_step(step: int, action: Callable[[], Any]) -> None:
    """Do something in the trainer when a step's samples have been recorded."""
    from mimscale.train.meter import Meter

    record_samples = Meter.record_samples

    def record_and_act(self: Meter, at: int, sample_ids: list[int]) -> None:
        record_samples(self, at, sample_ids)
        if at == step:
            action()

    Meter.record_samples = record_and_act


def killed_at(step: int, rank: int) -> None:
    """Every rank dies at a step, as with a node that loses its power."""
    _at_step(step, fault_injector.die)


def hang_in_step(bad_rank: int, step: int, rank: int) -> None:
    if rank == bad_rank:
        _at_step(step, fault_injector.hang)


def hang_in_write(bad_rank: int, folder: Path, disk: Path, wait_for_others_s: float, rank: int) -> None:
    """A file system never answers a write to a folder, nor any other from then on. Other ranks wait less long."""
    from mimscale.train import watchdog

    watchdog.WAIT_FOR_OTHERS_S = wait_for_others_s
    if rank == bad_rank:
        fault_injector.arm(fault_injector.hanging_write(0, below=folder, on_disk=disk))


def hang_with_the_interpreter_lock(bad_rank: int, step: int, wait_for_others_s: float, rank: int) -> None:
    """As a C call that never returns and holds the lock; the other ranks wait less long for its stacks."""
    from mimscale.train import watchdog

    watchdog.WAIT_FOR_OTHERS_S = wait_for_others_s
    if rank == bad_rank:
        _at_step(step, lambda: ctypes.PyDLL(None).sleep(1000))


def hang_in_loader_worker(bad_rank: int, batches: int, rank: int) -> None:
    """A worker delivers some parts and then nothing more."""
    from mimscale.stream.batch import SampleReader

    read_together, calls = SampleReader.read_together, []

    def read_or_hang(self: SampleReader, micro_batches: Any) -> Any:
        calls.append(None)
        if len(calls) > batches:
            fault_injector.hang()
        return read_together(self, micro_batches)

    if rank == bad_rank:
        SampleReader.read_together = read_or_hang


def data_error_and_leaving_that_waits(bad_rank: int, step: int, waited: Path, rank: int) -> None:
    """A rank alone finds data broken. To leave the process group waits for the others, as with NCCL; `waited` tells."""
    from torch import distributed

    from mimscale.errors import DataError

    def wait_for_others() -> None:
        waited.with_suffix(f".rank{rank}").touch()
        time.sleep(20)

    def find_broken_data() -> None:
        distributed.destroy_process_group = wait_for_others
        raise DataError("pack 7 is broken; ingest it again")

    if rank == bad_rank:
        _at_step(step, find_broken_data)


def nan_voxel(bad_rank: int, batch_index: int, rank: int) -> None:
    """One voxel of one sample of a global batch is NaN on the device."""
    from mimscale.train import pretrain

    normalise = pretrain.normalise

    def normalise_with_nan(batch: Any) -> Any:
        image, valid = normalise(batch)
        if batch.batch_index == batch_index:
            image[0, 0, 3, 5, 7] = float("nan")
        return image, valid

    if rank == bad_rank:
        pretrain.normalise = normalise_with_nan


def large_loss(bad_rank: int, batch_index: int, rank: int) -> None:
    """The loss of a global batch is a thousand times as large."""
    from mimscale.train.pretrain import MaskedReconstruction

    loss_of = MaskedReconstruction.loss

    def larger_loss(self: MaskedReconstruction, forward: Any, batch: Any) -> Any:
        return loss_of(self, forward, batch) * (1000 if batch.batch_index == batch_index else 1)

    if rank == bad_rank:
        MaskedReconstruction.loss = larger_loss


def infinite_loss(bad_rank: int, batch_index: int, rank: int) -> None:
    """The loss is infinite while its gradient is as usual, as with L1 and an infinite voxel in a hidden patch."""
    from mimscale.train.pretrain import MaskedReconstruction

    loss_of = MaskedReconstruction.loss

    def loss_and_infinity(self: MaskedReconstruction, forward: Any, batch: Any) -> Any:
        loss = loss_of(self, forward, batch)
        return loss + float("inf") if batch.batch_index == batch_index else loss

    if rank == bad_rank:
        MaskedReconstruction.loss = loss_and_infinity
