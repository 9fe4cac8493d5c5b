"""A BIDS folder: sub-*/[ses-*/]anat/*_T1w.nii.gz, label maps under derivatives/, tags in participants.tsv."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from mimscale import console
from mimscale.errors import DataError
from mimscale.ingest.config import IngestConfig
from mimscale.ingest.sources import table
from mimscale.ingest.sources.cases import first_problem, missing_channel
from mimscale.ingest.sources.fence import Fence, Target
from mimscale.ingest.sources.files import is_volume
from mimscale.ingest.sources.source import Listing, Source, stem

_SUBJECT = re.compile(r"sub-[A-Za-z0-9]+")
_SESSION = re.compile(r"ses-[A-Za-z0-9]+")
_DATATYPES = {"anat": "mr", "ct": "ct"}  # folders with one 3-D image a file, and their modality
_DRAWN = ("mask", "defacemask", "dseg", "probseg")  # suffixes of what is drawn on an image
_OF_LABELS = ("desc", "label", "seg", "atlas", "space", "res", "den")  # entities that the image of a label has not
_TAGS = {"acq": "acquisition", "ce": "contrast_agent"}  # not the session: its name may be a date

# What messages and tags may repeat; any other word in a name may be a person's.
_SUFFIXES = {"T1w", "T2w", "FLAIR", "PDw", "PDT2", "T2star", "T2starw", "inplaneT1", "inplaneT2", "angio", "T1map"}
_SUFFIXES |= {"T2map", "T1rho", "UNIT1", "SWI", "ct"}
_OTHER_DATATYPES = {"func", "dwi", "fmap", "perf", "meg", "eeg", "ieeg", "beh", "pet", "micr", "nirs", "mrs"}

Entities = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class _Image:
    entities: Entities
    suffix: str
    datatype: str
    target: Target


@dataclass(frozen=True)
class _Label:
    entities: Entities  # those of its image
    space: str | None  # suffix of the image on whose grid it lies, where it says so
    target: Target


def is_bids(folder: Path) -> bool:
    """True for a folder with a dataset_description.json, or with images where BIDS puts them."""
    if (folder / "dataset_description.json").is_file():
        return True
    fence = Fence(folder, allow_outside=False)
    places = (place for subject in _subjects(folder, fence) for place in _places(subject, fence))
    return any(os.path.basename(child.path) in _DATATYPES for place in places for child in fence.targets_in(place.path))


def listing(folder: Path, config: IngestConfig) -> Listing:
    """Images of anat/ and ct/: each a source, or those that `channel_names` lists the channels of one.

    Raises:
        DataError: no image at all, or images with several label maps.
    """
    fence = Fence(folder, config.allow_outside)
    images, closed = _images(folder, fence)
    volumes = _volumes(folder, images, config.channel_names)
    label_of, orphans = _assign(folder, _labels(folder, fence, config), list(volumes), config)
    tags = _participants(folder, config)
    sources = []
    for key, channels in volumes.items():
        label = label_of.get(key)
        entities = dict(channels[0].entities)
        subject = f"sub-{entities['sub']}"
        there = {image.suffix for image in channels}
        files = [image.target for image in channels] + ([label.target] if label else [])
        source = Source(
            channels=tuple(image.target.files for image in channels),
            label=label.target.files if label else (),
            subject=subject,
            modality=_DATATYPES[channels[0].datatype],
            tags={
                **tags.get(subject, {}),
                **({} if config.channel_names else {"suffix": _spoken(channels[0].suffix)}),
                **{tag: entities[entity] for entity, tag in _TAGS.items() if entity in entities},
            },
            problem=missing_channel([name in there for name in config.channel_names], config.channel_names)
            or first_problem(files),
        )
        sources.append(source)
    for label in orphans:
        source = Source(
            channels=(label.target.files,),
            subject=f"sub-{dict(label.entities)['sub']}",
            problem=("label_without_image", "a label map, and no image has its entities"),
        )
        sources.append(source)
    for target in closed:
        match = _SUBJECT.search(os.path.relpath(target.path, folder))
        source = Source(channels=(target.files,), subject=match[0] if match else "", problem=target.problem)
        sources.append(source)
    return Listing([(f"an image of {folder}", source) for source in sources], channel_names=config.channel_names)


def _images(folder: Path, fence: Fence) -> tuple[list[_Image], list[Target]]:
    """Everything in anat/ and ct/ that is no mask, and what cannot be entered. Says what is left out."""
    images: list[_Image] = []
    closed: list[Target] = []
    others: set[str] = set()
    odd_names = 0
    for subject in _subjects(folder, fence):
        for place in _places(subject, fence):
            for child in fence.targets_in(place.path):
                datatype = os.path.basename(child.path)
                if child.problem and not is_volume(child.path):
                    closed.append(child)
                elif datatype in _DATATYPES and child.is_folder:
                    for target in fence.targets_in(child.path):
                        entities, suffix = _name_parts(target.path)
                        if not is_volume(target.path):
                            closed += [target] if target.path == child.path else []
                        elif entities is None:
                            odd_names += 1
                        elif suffix not in _DRAWN:
                            images.append(_Image(entities, suffix, datatype, target))
                elif child.is_folder and not _SESSION.fullmatch(datatype):
                    others.add(datatype if datatype in _OTHER_DATATYPES else "folders of other names")
    if not images:
        raise DataError(f"{folder}: no sub-*/[ses-*/]anat/ folder of this BIDS folder holds an image")
    if others:
        console.say(f"{folder}: only anat/ and ct/ are read; left out: {', '.join(sorted(others))}")
    if odd_names:
        console.say(f"{folder}: {odd_names} file(s) of anat/ and ct/ have no name of BIDS and were left out")
    return images, closed


def _volumes(
    folder: Path, images: Sequence[_Image], channel_names: Sequence[str]
) -> dict[tuple[Entities, str], list[_Image]]:
    """The channels of each volume, by entities and suffix; the suffix is empty where channels have several."""
    grouped: dict[tuple[Entities, str], dict[str, _Image]] = defaultdict(dict)
    unused: Counter[str] = Counter()
    repeats = 0
    for image in images:
        if channel_names and image.suffix not in channel_names:
            unused[_spoken(image.suffix)] += 1
            continue
        group = grouped[image.entities, "" if channel_names else image.suffix]
        repeats += image.suffix in group
        group[image.suffix] = image
    shown = ", ".join(f"{suffix} {count}" for suffix, count in sorted(unused.items()))
    if not grouped:
        raise DataError(f"{folder}: has no suffix of channel_names=[{', '.join(channel_names)}]; it has {shown}")
    if unused:
        console.say(f"{folder}: left out, because channel_names does not list them: {shown}")
    if repeats:
        raise DataError(f"{folder}: {repeats} image(s) are there in two formats under one name; keep one of each")
    order = {name: number for number, name in enumerate(channel_names)}
    return {key: sorted(group.values(), key=lambda one: order.get(one.suffix, 0)) for key, group in grouped.items()}


def _labels(folder: Path, fence: Fence, config: IngestConfig) -> list[_Label]:
    labels, elsewhere = [], 0
    for target in _files_below(str(folder / "derivatives"), fence):
        if not is_volume(target.path) or not fnmatch(os.path.relpath(target.path, folder), config.bids_labels):
            continue
        entities, _ = _name_parts(target.path)
        if entities is None or "sub" not in dict(entities):
            elsewhere += 1
            continue
        all_of_it = dict(entities)
        space = all_of_it.get("space")
        if "res" in all_of_it or not (space is None or space == "orig" or space in _SUFFIXES):
            elsewhere += 1
            continue
        kept = frozenset(entity for entity in entities if entity[0] not in _OF_LABELS)
        labels.append(_Label(kept, None if space == "orig" else space, target))
    if elsewhere:
        console.say(
            f"{folder}: {elsewhere} label map(s) of derivatives/ lie in a template's space or another resolution, or "
            "name no subject, and were left out"
        )
    return labels


def _assign(
    folder: Path, labels: Sequence[_Label], keys: Sequence[tuple[Entities, str]], config: IngestConfig
) -> tuple[dict[tuple[Entities, str], _Label], list[_Label]]:
    """The label of each volume, and the labels that belong to none."""
    by_subject: dict[tuple[str, str], list[tuple[Entities, str]]] = defaultdict(list)
    for key in keys:
        for entity in key[0]:
            if entity[0] == "sub":
                by_subject[entity].append(key)
    label_of: dict[tuple[Entities, str], _Label] = {}
    orphans, several = [], 0
    for label in labels:
        own = by_subject.get(("sub", dict(label.entities)["sub"]), [])
        candidates = [key for key in own if key[0] == label.entities] or [key for key in own if key[0] > label.entities]
        # Derivatives of BIDS are drawn on the T1w unless they say otherwise.
        wanted = label.space or "T1w"
        candidates = [key for key in candidates if key[1] in ("", wanted)] or candidates
        if len(candidates) != 1:
            orphans.append(label)
        elif candidates[0] in label_of:
            several += 1
        else:
            label_of[candidates[0]] = label
    if several:
        raise DataError(
            f"{folder}: {several + len(label_of)} label maps for {len(label_of)} image(s) match "
            f"bids_labels={config.bids_labels}; narrow it, as in bids_labels='derivatives/NAME/*desc-X_dseg.nii.gz'"
        )
    return label_of, orphans


def _participants(folder: Path, config: IngestConfig) -> dict[str, dict[str, str]]:
    """Tags of each subject."""
    path = folder / "participants.tsv"
    if not path.is_file():
        return {}
    participants = table.read(path)
    if "participant_id" not in participants.columns:
        raise DataError(f"{path}: has no column participant_id; its columns are {', '.join(participants.columns)}")
    own = participants.columns.index("participant_id")
    kept = table.kept_columns(participants, {own}, config.keep_columns)
    tags = {}
    for row in participants.rows:
        cells = {name: str(row.cells[index]) for name, index in kept.items()}
        subject = f"sub-{str(row.cells[own]).removeprefix('sub-')}"
        tags[subject] = {name: cell for name, cell in cells.items() if cell not in ("", "n/a")}
    return tags


def _spoken(suffix: str) -> str:
    return suffix if suffix in _SUFFIXES else "other"


def _name_parts(path: str) -> tuple[Entities | None, str]:
    """Entities and suffix of a file name; None for one that is not built of them."""
    *parts, suffix = stem(path).split("_")
    pairs = [part.split("-", 1) for part in parts]
    if not pairs or any(len(pair) != 2 for pair in pairs) or pairs[0][0] != "sub":
        return None, suffix
    return frozenset((entity, value) for entity, value in pairs), suffix


def _subjects(folder: Path, fence: Fence) -> Iterator[Target]:
    return (child for child in fence.targets_in(str(folder)) if _SUBJECT.fullmatch(os.path.basename(child.path)))


def _places(subject: Target, fence: Fence) -> Iterator[Target]:
    """Where the datatypes of a subject stand: its own folder, and those of its sessions."""
    yield subject
    for child in fence.targets_in(subject.path):
        if _SESSION.fullmatch(os.path.basename(child.path)):
            yield child


def _files_below(folder: str, fence: Fence) -> Iterator[Target]:
    for target in fence.targets_in(folder):
        if not target.is_folder:
            yield target
        elif not os.path.islink(target.path):
            yield from _files_below(target.path, fence)
