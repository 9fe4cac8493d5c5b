"""The training state on disk: fp32 master weights and AdamW's moments, in ranges that any number of ranks can read.

    state-rank00003.safetensors    what rank 3 held: flat tensors `weights`, `exp_avg`, `exp_avg_sq`, all [n] fp32
    state.json                     parameter -> its ranges: [first element, elements, file, where in the file's tensors]

Nothing in it depends on how the writers shared the state, so a run of another size or ZeRO stage reads just the ranges
that it holds itself: no conversion, no second copy, no pickle.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mimscale import durable
from mimscale.errors import CheckpointError
from mimscale.models.tensor_file import header, write_tensors
from mimscale.train.committed import PART_PREFIX

KINDS = ("weights", "exp_avg", "exp_avg_sq")
INDEX = "state.json"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A range of one parameter that this rank holds, as views of what the optimizer steps on."""

    name: str  # of the parameter
    start: int  # its first element in the flattened parameter
    tensors: Mapping[str, Tensor]  # kind -> [elements]

    @property
    def elements(self) -> int:
        """How many elements of the parameter it holds."""
        return self.tensors["weights"].numel()


@dataclass(frozen=True, kw_only=True)
class PartIndex:
    """What one rank's file holds."""

    adam_steps: int  # updates that the optimizer has made
    ranges: list[tuple[str, int, int]]  # parameter, first element, elements: in the order of the file


def state_file(rank: int) -> str:
    """The name of a rank's file."""
    return f"{PART_PREFIX}{rank:05d}.safetensors"


class Snapshot:
    """A rank's part of the training state in host memory. The memory is used again by the next snapshot.

    Args:
        rank: whose.
        pinned: page-locked memory, into which a GPU copies at full speed.
    """

    def __init__(self, rank: int, *, pinned: bool) -> None:
        self._name = state_file(rank)
        self._pinned = pinned
        self._adam_steps = 0
        self._buffer = torch.empty(len(KINDS), 0)
        self._ranges: list[tuple[str, int, int]] = []  # parameter, first element, elements
        self.full_weights: dict[str, Tensor] = {}  # on rank 0

    @property
    def elements(self) -> int:
        """Elements of each kind."""
        return sum(elements for _, _, elements in self._ranges)

    def take(self, pieces: Iterable[Piece], adam_steps: int, full_weights: dict[str, Tensor]) -> None:
        """Copy what a rank holds."""
        held = list(pieces)
        self._ranges = [(piece.name, piece.start, piece.elements) for piece in held]
        self._adam_steps, self.full_weights = adam_steps, full_weights
        if self._buffer.shape != (len(KINDS), self.elements):
            self._buffer = torch.empty(len(KINDS), self.elements, pin_memory=self._pinned)
        offset = 0
        for piece in held:
            for row, kind in zip(self._buffer, KINDS, strict=True):
                row[offset : offset + piece.elements].copy_(piece.tensors[kind], non_blocking=True)
            offset += piece.elements
        if self._pinned:
            torch.cuda.synchronize()

    @property
    def file_bytes(self) -> int:
        """What `write` writes."""
        return len(header(self._tensors())) + self._buffer.nbytes

    def write(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Write and flush the rank's file; returns its name with its bytes and sha256.

        Raises:
            OSError: the disk is full or not writable.
        """
        path = folder / self._name
        try:
            with path.open("wb") as file:
                sha256 = write_tensors(file, self._tensors())
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            path.unlink(missing_ok=True)  # at once: the run has other things to write to a full disk
            raise
        return {self._name: {"bytes": self.file_bytes, "sha256": sha256}}

    def index(self) -> "PartIndex":
        """What the file holds."""
        return PartIndex(adam_steps=self._adam_steps, ranges=self._ranges)

    def _tensors(self) -> dict[str, Tensor]:
        return dict(zip(KINDS, self._buffer, strict=True))


def write_index(folder: Path, parts: list[PartIndex], shapes: Mapping[str, list[int]]) -> Path:
    """Write state.json from the index of every rank, in rank order; returns its path.

    Raises:
        CheckpointError: the ranks have made different numbers of updates.
        OSError: the disk is full or not writable.
    """
    steps = [part.adam_steps for part in parts]
    if len(set(steps)) > 1:
        raise CheckpointError(f"{folder}: the ranks have made different numbers of updates: {steps}")
    ranges: dict[str, list[list[int]]] = {name: [] for name in shapes}
    for rank, part in enumerate(parts):
        offset = 0
        for name, start, elements in part.ranges:
            ranges[name].append([start, elements, rank, offset])
            offset += elements
    tree = {
        "adam_steps": steps[0],
        "files": [state_file(rank) for rank in range(len(parts))],
        "shapes": dict(shapes),
        "ranges": ranges,
    }
    durable.write_text(folder / INDEX, json.dumps(tree, separators=(",", ":")) + "\n")
    return folder / INDEX


class SavedState:
    """The training state of a checkpoint whose files have been verified.

    Raises:
        CheckpointError: the index is not one of ours, or names a file that the manifest does not hold.
    """

    def __init__(self, folder: Path, files: Iterable[str]) -> None:
        self._folder = folder
        self._open: dict[str, Any] = {}
        try:
            tree = json.loads((folder / INDEX).read_text())
            self.adam_steps = int(tree["adam_steps"])
            self._files = [str(name) for name in tree["files"]]
            self._shapes = {str(name): [int(edge) for edge in shape] for name, shape in tree["shapes"].items()}
            self._ranges = {
                str(name): sorted(
                    (int(start), int(elements), int(file), int(offset)) for start, elements, file, offset in ranges
                )
                for name, ranges in tree["ranges"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{folder / INDEX}: no readable index of the training state ({error!r})") from None
        unknown = set(self._files) - set(files)
        if unknown:
            raise CheckpointError(f"{folder / INDEX}: names {sorted(unknown)}, which the manifest does not hold")

    def refuse_other_model(self, shapes: Mapping[str, list[int]]) -> None:
        """Raise CheckpointError unless the model has just these parameters and shapes."""
        if shapes != self._shapes:
            names = sorted(
                name for name in shapes.keys() | self._shapes.keys() if shapes.get(name) != self._shapes.get(name)
            )
            first = names[0]
            raise CheckpointError(
                f"{self._folder}: holds another model; {len(names)} parameter(s) differ, {first} is "
                f"{self._shapes.get(first)} there and {shapes.get(first)} in this run"
            )

    def fill(self, pieces: Iterable[Piece]) -> None:
        """Read the ranges of `pieces` into their tensors.

        Raises:
            CheckpointError: a range is missing or lies outside its file.
        """
        for piece in pieces:
            for kind in KINDS:
                self._read(piece.name, kind, piece.start, piece.tensors[kind])

    def full(self, name: str, kind: str) -> Tensor:
        """One whole tensor of a parameter, in its shape."""
        whole = torch.empty(math.prod(self._shapes[name]))
        self._read(name, kind, 0, whole)
        return whole.reshape(self._shapes[name])

    def _read(self, name: str, kind: str, first: int, into: Tensor) -> None:
        done, end = first, first + into.numel()
        for start, elements, file, offset in self._ranges.get(name, []):
            if start <= done < min(end, start + elements):
                until = min(end, start + elements)
                source = self._slice(file, kind, offset + done - start, offset + until - start)
                into[done - first : until - first].copy_(source)
                done = until
        if done < end:
            raise CheckpointError(f"{self._folder / INDEX}: {name} has no elements {done} to {end - 1} in {kind}")

    def _slice(self, file: int, kind: str, start: int, end: int) -> Tensor:
        try:
            name = self._files[file]
            if name not in self._open:
                # A file stays open: its pages are mapped, and thousands of ranges may lie in it.
                self._open[name] = safe_open(self._folder / name, framework="pt", device="cpu")
            tensor = self._open[name].get_slice(kind)
            (length,) = tensor.get_shape()
            if not 0 <= start <= end <= length:
                raise ValueError(f"elements {start} to {end} of {length}")
            values = tensor[start:end]
        except (OSError, IndexError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{self._folder}: {INDEX} does not fit file {file} ({error})") from None
        assert isinstance(values, Tensor)
        return values
