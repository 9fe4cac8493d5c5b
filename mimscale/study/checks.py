"""Is the data what a study takes it for, and has pretraining seen what others are tested on?"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimscale.store.layout import StoreInfo, read_info
from mimscale.store.manifest import Manifest, load_manifest
from mimscale.stream.config import StreamConfig
from mimscale.stream.select import parse_filter
from mimscale.stream.subjects import first_subjects, in_split
from mimscale.study.config import ExpectConfig

NAMED = 3  # volumes that a message names
SPACING_SLACK_MM = 1e-3  # headers hold float32


@dataclass(frozen=True, kw_only=True)
class VolumeUse:
    """Volumes of a store that a run trains on, validates on or is tested on."""

    store: Path
    split: str  # train or val
    stream: StreamConfig
    modality: str | None = None
    overlay: str | None = None  # only volumes that have it


def store_problems(store: Path, expect: ExpectConfig) -> list[str]:
    """How a store differs from what is expected, one sentence each.

    Raises:
        DataError: no store.
    """
    info, manifest = read_info(store), load_manifest(store)
    splits = {split: int(manifest.equal(split=split).sum()) for split in ("train", "val")}
    problems = []
    for name, found in (*splits.items(), ("volumes", len(manifest))):
        wanted = getattr(expect, name)
        if wanted is not None and wanted != found:
            problems.append(f"{found} {'volumes' if name == 'volumes' else f'volumes to {name}'}, expected {wanted}")
    if expect.modality is not None and info.modality != expect.modality:
        problems.append(f"modality {info.modality}, expected {expect.modality}")
    shapes = manifest_shapes(manifest)  # [N, 4]
    if expect.channels is not None:
        problems += _outside(manifest, "channels", shapes[:, :1], (expect.channels,), (expect.channels,), 0)
    if expect.spacing_mm is not None:
        spacing_mm = manifest.column("spacing_mm")
        problems += _outside(manifest, "spacing_mm", spacing_mm, *expect.spacing_mm, SPACING_SLACK_MM)
    if expect.shape is not None:
        problems += _outside(manifest, "shape", shapes[:, 1:], *expect.shape, 0)
    if expect.class_names:
        problems += _class_problems(info.overlays, manifest, expect)
    return problems


def manifest_shapes(manifest: Manifest) -> NDArray[np.int64]:
    """[N, 4]: channels, Z, Y, X."""
    return np.asarray(manifest.column("shape"), dtype=np.int64)


def _outside(
    manifest: Manifest, what: str, values: NDArray[Any], low: Sequence[float], high: Sequence[float], slack: float
) -> list[str]:
    wrong = np.flatnonzero(((values < np.array(low) - slack) | (values > np.array(high) + slack)).any(axis=1))
    if not len(wrong):
        return []
    ids = manifest.column("id")
    some = ", ".join(f"{ids[row]} has {_text(values[row])}" for row in wrong[:NAMED])
    wanted = _text(low) if list(low) == list(high) else f"{_text(low)} to {_text(high)}"
    return [f"{what} of {len(wrong)} volume(s): {some}{', ...' if len(wrong) > NAMED else ''}; expected {wanted}"]


def _text(values: Sequence[float] | NDArray[Any]) -> str:
    return " x ".join(f"{value:g}" for value in values)


def _class_problems(overlays: dict[str, Any], manifest: Manifest, expect: ExpectConfig) -> list[str]:
    if expect.overlay not in overlays:
        return [f"no overlay {expect.overlay!r}; ingest the volumes with their labels"]
    names = tuple(overlays[expect.overlay].class_names)
    if names != expect.class_names:
        return [f"classes {', '.join(names)}; expected {', '.join(expect.class_names)}"]
    problems = []
    labelled = np.flatnonzero(manifest.overlay_parts(expect.overlay) >= 0)
    if len(labelled) < len(manifest):
        problems.append(f"{len(manifest) - len(labelled)} volume(s) have no label")
    present = np.zeros(len(names), dtype=np.int64)
    for row in labelled:
        counts = manifest.class_voxels(expect.overlay, np.array([row]))
        present[: len(counts)] += counts > 0
    least = expect.every_class_in * len(labelled)
    for name, found in zip(names, present, strict=True):
        if found < least:
            problems.append(f"class {name} is in {found} of {len(labelled)} labelled volumes; expected in {least:.0f}")
    return problems


def seen_in_pretraining(pretraining: VolumeUse, held_out: Sequence[VolumeUse]) -> list[str]:
    """Held-out volumes that pretraining reads: `STORE: volume ID`.

    Two volumes are the same when their source files or their voxels are; of stores with one subject key also when they
    are of one subject.

    Raises:
        DataError: no store.
        ConfigError: a filter that is none.
    """
    info, manifest, rows = _used(pretraining)
    seen = {kind: set(manifest.column(kind)[rows]) for kind in ("source_sha256", "voxels_sha256", "subject")}
    found = []
    for use in held_out:
        other_info, other, other_rows = _used(use)
        kinds = ["source_sha256", "voxels_sha256"]
        if other_info.subject_key_fingerprint == info.subject_key_fingerprint:
            kinds.append("subject")
        ids, columns = other.column("id"), {kind: other.column(kind) for kind in kinds}
        for row in other_rows:
            if any(columns[kind][row] in seen[kind] for kind in kinds):
                found.append(f"{use.store}: volume {ids[row]}")
    return list(dict.fromkeys(found))


def _used(use: VolumeUse) -> tuple[StoreInfo, Manifest, NDArray[np.int64]]:
    manifest = load_manifest(use.store)
    return read_info(use.store), manifest, used_rows(use, manifest)


def used_rows(use: VolumeUse, manifest: Manifest) -> NDArray[np.int64]:
    """The rows of a store that are used."""
    keep = in_split(manifest, use.split, use.stream)
    if use.modality is not None:
        keep = keep & manifest.equal(modality=use.modality)
    if use.stream.filter is not None:
        keep = keep & parse_filter(use.stream.filter).select(manifest)
    if use.overlay is not None:
        keep = keep & (manifest.overlay_parts(use.overlay) >= 0)
    rows = np.flatnonzero(keep).astype(np.int64)
    return first_subjects(manifest, rows, use.stream.train_fraction) if use.split == "train" else rows
