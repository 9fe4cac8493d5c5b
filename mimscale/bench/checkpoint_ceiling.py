"""What the machine alone takes for the bytes of a checkpoint: a copy, a plain write and flush, a read, a hash.

The ceiling beside `mimscale bench checkpoint`: nothing that does the same with as many bytes is faster.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mimscale.bench.hardware import seconds_of
from mimscale.models.tensor_file import WRITTEN_AT_ONCE_BYTES
from mimscale.train.ranks import Ranks

# Larger than the caches, and no second state in memory: larger parts go through it piece by piece.
_BUFFER_BYTES = 2**29
KINDS = ("copy", "write", "read", "hash")


class Ceiling:
    """The bytes of one rank's part, and what the machine takes for them.

    Args:
        folder: on the file system that the checkpoint is written to.
        part_bytes: that this rank writes of a checkpoint.
        ranks: all ranks, which work at the same time as they do for a checkpoint.
    """

    def __init__(self, folder: Path, part_bytes: int, ranks: Ranks) -> None:
        self._file = folder / f"ceiling-rank{ranks.world.rank:05d}"
        self._part_bytes = part_bytes
        self._ranks = ranks
        # Random: some file systems store less of bytes that repeat.
        block = torch.randint(256, (WRITTEN_AT_ONCE_BYTES,), dtype=torch.uint8)
        buffer_bytes = min(part_bytes, _BUFFER_BYTES)
        self._source = block.repeat(-(-buffer_bytes // len(block)))[:buffer_bytes].to(ranks.device)
        self._target = torch.zeros(buffer_bytes, dtype=torch.uint8, pin_memory=ranks.device.type == "cuda")
        self._target.copy_(self._source)
        self._bytes: Any = self._target.numpy().data

    def seconds(self) -> dict[str, float]:
        """Of each kind the seconds of the slowest rank. A collective.

        Raises:
            OSError: the disk is full or not writable.
        """
        slowest = {}
        calls = {"copy": self._copy, "write": self._write, "read": self._read, "hash": self._hash}
        try:
            for kind in KINDS:
                self._ranks.gather(None)  # all begin together
                slowest[kind] = max(self._ranks.gather(seconds_of(calls[kind], self._ranks.device)))
        finally:
            self._file.unlink(missing_ok=True)
        return slowest

    def _pieces(self, largest_bytes: int) -> Iterator[tuple[int, int]]:
        """Begin and end in the buffer, of as many bytes as the part has."""
        left, begin = self._part_bytes, 0
        while left:
            end = min(begin + min(left, largest_bytes), len(self._target))
            yield begin, end
            left -= end - begin
            begin = end % len(self._target)

    def _copy(self) -> None:
        for begin, end in self._pieces(len(self._target)):
            self._target[begin:end].copy_(self._source[begin:end], non_blocking=True)

    def _write(self) -> None:
        with self._file.open("wb", buffering=0) as file:
            for begin, end in self._pieces(WRITTEN_AT_ONCE_BYTES):
                while begin < end:
                    begin += file.write(self._bytes[begin:end])
            os.fsync(file.fileno())

    def _read(self) -> None:
        with self._file.open("rb", buffering=0) as file:
            for begin, end in self._pieces(WRITTEN_AT_ONCE_BYTES):
                while begin < end:
                    begin += file.readinto(self._bytes[begin:end])

    def _hash(self) -> None:
        digest = hashlib.sha256()
        for begin, end in self._pieces(WRITTEN_AT_ONCE_BYTES):
            digest.update(self._bytes[begin:end])
