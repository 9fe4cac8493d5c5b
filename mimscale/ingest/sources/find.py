"""Which form of list `sources` is, and the union of several."""

import dataclasses
import os
from collections import defaultdict
from pathlib import Path

from mimscale.console import say
from mimscale.errors import DataError
from mimscale.ingest.config import ImageLabel, ImageLabelGlobs, IngestConfig, Sources
from mimscale.ingest.sources import (
    bids,
    dataset_json,
    decathlon,
    dicom_tree,
    folder,
    globs,
    nnunet,
    subject_folders,
    table,
)
from mimscale.ingest.sources.cases import first_problem
from mimscale.ingest.sources.fence import Fence, typed
from mimscale.ingest.sources.source import Found, Listing, Source, refuse_subjects_in_both_splits, subject_of


def find(sources: Sources, config: IngestConfig) -> Found:
    """Expand `sources`. No voxel is read; what cannot be opened is a source with a `problem`.

    Messages name what the user typed, and lines or entries of a list; never a file that was found or a subject.

    Raises:
        DataError: a list that names nothing, is not understood, or contradicts itself.
    """
    listings = [_listing(source, config) for source in (sources if isinstance(sources, list) else [sources])]
    if not listings:
        raise DataError("sources=[]: the list is empty; give globs, or {image: FILE, label: FILE}")
    entries = [entry for listing in listings for entry in listing.entries]
    if config.labelled_only:
        entries = _labelled(entries)
    refuse_subjects_in_both_splits(entries)
    return Found(
        _each_once(_with_split_of_subject(entries)),
        _agreed("class names", [listing.class_names for listing in listings]),
        _agreed_channels([listing.channel_names for listing in listings]),
    )


def _labelled(entries: list[tuple[str, Source]]) -> list[tuple[str, Source]]:
    kept = [(place, source) for place, source in entries if source.label]
    if not kept:
        raise DataError(f"labelled_only=true: none of the {len(entries)} volume(s) of sources has a label map")
    if len(kept) < len(entries):
        say(f"labelled_only: {len(entries) - len(kept)} volume(s) without a label map are left out")
    return kept


def _listing(source: str | ImageLabel | ImageLabelGlobs, config: IngestConfig) -> Listing:
    if isinstance(source, ImageLabel):
        return _pair(source, config)
    if isinstance(source, ImageLabelGlobs):
        return globs.pairs(source, config)
    path = Path(os.path.normpath(Path(source).expanduser()))
    suffix = path.suffix.lower()
    if path.is_dir():
        return _folder(path, config)
    if suffix == ".json":
        return _data_set(path, config)
    if suffix in table.SUFFIXES:
        return table.listing(path, config)
    if dicom_tree.is_directory(str(path)):
        return dicom_tree.dicomdir(path, config)
    return globs.listing(source, config)


def _folder(path: Path, config: IngestConfig) -> Listing:
    if (path / "dataset.json").is_file():
        return _data_set(path / "dataset.json", config)
    if nnunet.is_raw(path, None):
        return nnunet.listing(path, None, config)
    if bids.is_bids(path):
        return bids.listing(path, config)
    if subject_folders.is_layout(path, config):
        return subject_folders.listing(path, config)
    return folder.listing(str(path), [path], config)


def _data_set(path: Path, config: IngestConfig) -> Listing:
    tree = dataset_json.read(path)
    if nnunet.is_raw(path.parent, tree):
        return nnunet.listing(path.parent, tree, config)
    return decathlon.listing(path, tree, config)


def _pair(pair: ImageLabel, config: IngestConfig) -> Listing:
    images = [typed(image) for image in ((pair.image,) if isinstance(pair.image, str) else pair.image)]
    label = [typed(pair.label)] if pair.label is not None else []
    folders = {image.path: Fence(Path(image.path), config.allow_outside) for image in images if image.is_folder}
    source = Source(
        channels=tuple(image.files for image in images),
        label=label[0].files if label else (),
        subject="" if folders else subject_of(images[0].path, config.subject_pattern),
        problem=first_problem(images + label),
    )
    return Listing(dicom_tree.open_folders([("a pair of sources", source)], folders, config))


def _with_split_of_subject(entries: list[tuple[str, Source]]) -> list[tuple[str, Source]]:
    """Where a list says the split of some volumes of a subject, the others of it follow."""
    splits = {source.subject: source.split for _, source in entries if source.split is not None}
    return [
        (place, dataclasses.replace(source, split=splits[source.subject]))
        if source.split is None and source.subject in splits
        else (place, source)
        for place, source in entries
    ]


def _each_once(entries: list[tuple[str, Source]]) -> tuple[Source, ...]:
    """Sorted. What several lists name is kept as the list says it that says most; other labels are other sources."""
    same_files: dict[tuple[tuple[str, ...], ...], list[tuple[str, Source]]] = defaultdict(list)
    for entry in entries:
        same_files[entry[1].channels].append(entry)
    kept = []
    for group in same_files.values():
        splits = {source.split: place for place, source in group if source.split is not None}
        if len(splits) > 1:
            raise DataError(f"sources: one image is in train ({splits['train']}) and in val ({splits['val']})")
        labels = {source.label for _, source in group if source.label} or {()}
        for label in labels:
            kept.append(max((source for _, source in group if source.label == label), key=_how_much_it_says))
    return tuple(sorted(kept, key=lambda source: (source.channels, source.label)))


def _how_much_it_says(source: Source) -> tuple[bool, bool, int, bool, str]:
    return (
        source.problem is None,
        source.split is not None,
        len(source.tags),
        source.modality is not None,
        source.subject,
    )


def _agreed(what: str, names: list[tuple[str, ...]]) -> tuple[str, ...]:
    given = sorted({each for each in names if each})
    if len(given) > 1:
        raise DataError(f"sources: {what} {list(given[0])} of one list are not {list(given[1])} of another")
    return given[0] if given else ()


def _agreed_channels(names: list[tuple[str, ...]]) -> tuple[str, ...]:
    """Names of the channels. Lists of one channel may call it as they like (CT, ct); then it has no name."""
    if len(set(names)) > 1 and all(len(each) <= 1 for each in names):
        return ()
    return _agreed("channel names", names)
