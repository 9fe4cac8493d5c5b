"""Which source goes into which part: decided once, before anything is read, and kept beside the store.

A *round* is one listing of sources. Its parts get the next free numbers, so data that comes later never changes a pack
that is there. A source's part is a hash of its name below the sources' common folder: no file is read for it, and each
file is read once, when it is converted. Any number of workers and array tasks share the parts of one plan.

    STORE.plan.jsonl    for each round one line about it, then one line a source; beside the store and private (0600),
                        because names of files and subjects name patients
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mimscale import durable
from mimscale.config import tree_hash
from mimscale.errors import DataError
from mimscale.ingest.sources import Source

_WAY_OUT = "free some space and run the same command again"
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class PlannedSource:
    """One volume to be, and the part that it goes into."""

    channels: tuple[tuple[str, ...], ...]  # files of each channel; see `Source`
    label: tuple[str, ...]
    subject: str
    modality: str | None
    split: str | None
    tags: Mapping[str, str]
    problem: tuple[str, str] | None
    part: int
    size_bytes: int
    image_stamp: str  # of sizes and times of the image's files: another one means that these are other files now
    label_stamp: str
    overlay_of: str | None = None  # the volume that is stored already; only its label map is to be read

    @property
    def image(self) -> tuple[str, ...]:
        """All files of the image."""
        return tuple(file for channel in self.channels for file in channel)

    def receipt_key(self, key: bytes) -> str:
        """What names this source inside the store, where no file name may stand: 16 hex digits, keyed."""
        text = json.dumps([self.part, self.channels, self.label, self.image_stamp, self.label_stamp])
        return hashlib.blake2b(text.encode(), key=key, digest_size=8).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Round:
    """One listing of sources, and the config that it is converted with."""

    first_part: int
    num_parts: int
    config: dict[str, Any]  # the ingest config, without what changes no voxel and no row
    class_names: tuple[str, ...]
    sources: tuple[PlannedSource, ...] = field(repr=False)

    @property
    def config_hash(self) -> str:
        """Of `config`."""
        return tree_hash(self.config)

    @property
    def parts(self) -> range:
        """The numbers of its parts."""
        return range(self.first_part, self.first_part + self.num_parts)

    def by_part(self) -> dict[int, list[PlannedSource]]:
        """The sources of each part, in the order in which they are stored."""
        parts: dict[int, list[PlannedSource]] = {part: [] for part in self.parts}
        for source in self.sources:
            parts[source.part].append(source)
        return parts


@dataclass(frozen=True)
class Plan:
    """All rounds of a store, oldest first."""

    rounds: tuple[Round, ...] = ()

    @property
    def num_parts(self) -> int:
        """Number of the next part."""
        return self.rounds[-1].parts.stop if self.rounds else 0

    @property
    def sources(self) -> Iterable[PlannedSource]:
        """All sources, oldest round first."""
        return (source for one in self.rounds for source in one.sources)


def plan_path(store: Path) -> Path:
    """Where the plan of a store lies: beside it, because it names files and subjects."""
    return store.with_name(f"{store.name}.plan.jsonl")


def plan_round(
    found: Sequence[Source],
    *,
    first_part: int,
    num_parts: int | None,
    part_bytes: int,
    config: dict[str, Any],
    class_names: tuple[str, ...],
    overlay_of: Mapping[int, str] | None = None,
) -> Round:
    """Share sources out to parts. The result depends on names and sizes only, not on their order or on a root folder.

    Args:
        found: the sources.
        first_part: number of the first part of this round.
        num_parts: how many parts; None: total size / `part_bytes`.
        part_bytes: see `num_parts`.
        config: see `Round`.
        class_names: names of label values.
        overlay_of: index of a source -> volume id, where the image is stored already.
    """
    root = _common_folder(found)
    measured = [(source, _measure(_image(source)), _measure(source.label)) for source in found]
    count = num_parts or max(
        1, -(-sum(image.size_bytes + label.size_bytes for _, image, label in measured) // part_bytes)
    )
    planned = []
    for index, (source, image, label) in enumerate(measured):
        digest = hashlib.sha256(os.fsencode(_name_below(source, root))).digest()
        planned.append(
            (
                digest,
                PlannedSource(
                    **{name: getattr(source, name) for name in _SOURCE_FIELDS},
                    part=first_part + int.from_bytes(digest[8:16]) % count,
                    size_bytes=image.size_bytes + label.size_bytes,
                    image_stamp=image.stamp,
                    label_stamp=label.stamp,
                    overlay_of=(overlay_of or {}).get(index),
                ),
            )
        )
    # Of equal images of a part a labelled one should come first, so that it is the one that is kept.
    planned.sort(key=lambda one: (not one[1].label, one[0]))
    sources = tuple(source for _, source in planned)
    return Round(first_part=first_part, num_parts=count, config=config, class_names=class_names, sources=sources)


_SOURCE_FIELDS = tuple(field.name for field in dataclasses.fields(Source))


def _common_folder(found: Sequence[Source]) -> str:
    folders = {os.path.dirname(file) for source in found for channel in source.channels for file in channel[:1]}
    return os.path.commonpath(folders) if folders and len({os.path.isabs(folder) for folder in folders}) == 1 else ""


def _name_below(source: Source, root: str) -> str:
    return "\0".join(os.path.relpath(channel[0], root) if root else channel[0] for channel in source.channels)


@dataclass(frozen=True)
class _Measure:
    size_bytes: int
    stamp: str  # differs when a file is replaced


def _image(source: Source) -> tuple[str, ...]:
    return tuple(file for channel in source.channels for file in channel)


def image_stamp(source: Source) -> str:
    """A stamp that differs when a file of the image is replaced."""
    return _measure(_image(source)).stamp


def _measure(files: Sequence[str]) -> _Measure:
    size_bytes, seen = 0, []
    for file in files:
        try:
            status = os.stat(file)
        except OSError:
            seen.append((-1, -1))  # converting it says what is wrong
            continue
        size_bytes += status.st_size
        seen.append((status.st_size, status.st_mtime_ns))
    return _Measure(size_bytes, hashlib.blake2b(json.dumps(seen).encode(), digest_size=8).hexdigest())


def new_sources(plan: Plan, found: Sequence[Source], overlay: str) -> list[Source]:
    """Those of `found` that the plan does not hold yet, or holds with other files, another label or another overlay."""
    known: set[tuple[object, ...]] = set()
    for one in plan.rounds:
        for planned in one.sources:
            if planned.label:
                name = one.config["overlay"]
                known.add((planned.channels, planned.image_stamp, planned.label, planned.label_stamp, name))
            known.add((planned.channels, planned.image_stamp))
    fresh = []
    for source in found:
        image: tuple[object, ...] = (source.channels, image_stamp(source))
        whole = (*image, source.label, _measure(source.label).stamp, overlay) if source.label else image
        if whole not in known:
            fresh.append(source)
    return fresh


def read_plan(store: Path) -> Plan:
    """The plan of a store; without rounds when nothing has been planned.

    Raises:
        DataError: it is damaged.
    """
    path = plan_path(store)
    if not path.exists():
        return Plan()
    rounds: list[tuple[dict[str, Any], list[PlannedSource]]] = []
    try:
        with path.open() as file:
            for line in file:
                tree = json.loads(line)
                if "first_part" in tree:
                    if tree.pop("version") != _VERSION:
                        raise DataError(f"{path}: written by another version of mimscale; use that one")
                    rounds.append((tree, []))
                else:
                    rounds[-1][1].append(_source_of_tree(tree))
        return Plan(
            tuple(
                Round(**{**tree, "class_names": tuple(tree["class_names"])}, sources=tuple(sources))
                for tree, sources in rounds
            )
        )
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"{path}: damaged ({error}); restore it, or ingest into another out") from None


def write_plan(store: Path, plan: Plan) -> None:
    """Write the plan of a store, complete or not at all, for its owner's eyes only."""
    path = plan_path(store)
    with durable.explained(DataError, path, _WAY_OUT), durable.open_atomically(path) as file:
        os.fchmod(file.fileno(), 0o600)
        for one in plan.rounds:
            tree = {
                "version": _VERSION,
                "first_part": one.first_part,
                "num_parts": one.num_parts,
                "config": one.config,
                "class_names": one.class_names,
            }
            file.write(json.dumps(tree, sort_keys=True).encode() + b"\n")
            for source in one.sources:
                file.write(json.dumps(vars(source), sort_keys=True, default=dict).encode() + b"\n")


def _source_of_tree(tree: dict[str, Any]) -> PlannedSource:
    return PlannedSource(
        **{
            **tree,
            "channels": tuple(map(tuple, tree["channels"])),
            "label": tuple(tree["label"]),
            "problem": None if tree["problem"] is None else tuple(tree["problem"]),
        }
    )
