"""One volume to be, and the words that lists use for subjects, splits and modalities."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from mimscale.errors import DataError
from mimscale.ingest.formats import SUFFIXES
from mimscale.ingest.sources.files import Problem


@dataclass(frozen=True, kw_only=True)
class Source:
    """One volume to be, as the user's list names it."""

    channels: tuple[tuple[str, ...], ...]  # files of each channel; one entry when one file (or series) holds them all
    label: tuple[str, ...] = ()  # files of the label map; empty without one
    subject: str  # as names or headers say; hashed before it reaches the store
    modality: str | None = None  # from the list or the file; None: the recipe's
    split: str | None = None  # "train" or "val" when the list says so
    tags: Mapping[str, str] = field(default_factory=dict)  # further columns, kept for filtering
    problem: Problem | None = None  # why it cannot even be opened


@dataclass(frozen=True)
class Found:
    """What `sources` stands for."""

    sources: tuple[Source, ...]  # sorted, each once
    class_names: tuple[str, ...] = ()  # of label value 0, 1, ..., where a list gives them
    channel_names: tuple[str, ...] = ()  # where a list gives them


@dataclass(frozen=True)
class Listing:
    """What one list names. A place is what messages may print of a source: it names no patient."""

    entries: list[tuple[str, Source]]  # place ("line 7 of scans.csv") and source
    class_names: tuple[str, ...] = ()
    channel_names: tuple[str, ...] = ()


def stem(path: str) -> str:
    """File name without folder and without the suffix of its format."""
    name = os.path.basename(path)
    lower = name.lower()
    for suffix in SUFFIXES:
        if lower.endswith(suffix):
            return name[: -len(suffix)]
    return name


def subject_of(image: str, pattern: str) -> str:
    """The subject that a file name stands for: the first group of `pattern` that matches, else the whole stem."""
    name = stem(image)
    match = re.search(pattern, name)
    groups = [group for group in match.groups() if group] if match else []
    return str(groups[0]) if groups else name


_MR = {
    "mr",
    "mri",
    "t1",
    "t1w",
    "t1c",
    "t1ce",
    "t1gd",
    "t1n",
    "t2",
    "t2w",
    "t2f",
    "t2star",
    "flair",
    "pd",
    "pdw",
    "adc",
    "dwi",
}


def modality_of(text: str) -> str | None:
    """What `modality` a list or a header means; None when it says nothing."""
    word = re.sub(r"[^a-z0-9]", "", text.lower())
    if not word:
        return None
    return "ct" if word == "ct" else "mr" if word in _MR else "other"


def modality_of_channels(names: Iterable[str]) -> str | None:
    """The modality of channels with these names; None when they differ or say nothing that is known."""
    kinds = {modality_of(name) for name in names}
    return kinds.pop() if len(kinds) == 1 and "other" not in kinds else None


def refuse_subjects_in_both_splits(entries: Iterable[tuple[str, Source]]) -> None:
    """Raise DataError with the places of subjects that a list puts into train and into val."""
    places: dict[tuple[str, str], str] = {}
    for place, source in entries:
        if source.split is not None:
            places.setdefault((source.subject, source.split), place)
    both = [(place, places[subject, "val"]) for (subject, split), place in places.items()
            if split == "train" and (subject, "val") in places]  # fmt: skip
    if both:
        shown = "; ".join(f"train: {train}, val: {val}" for train, val in both[:3])
        raise DataError(
            f"sources: {len(both)} subject(s) are in both splits ({shown}{'; ...' if both[3:] else ''}); a model would "
            "be validated on what it has seen: give all rows of a subject one split, or leave the split empty"
        )
