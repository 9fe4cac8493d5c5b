"""The raw layout of nnU-Net: imagesTr/CASE_0000.nii.gz, CASE_0001.nii.gz, ..., labelsTr/CASE.nii.gz, dataset.json.

Both its forms: version 1 (`modality`, {"0": "background"}) and version 2 (`channel_names`, {"background": 0},
`file_ending`, and `dataset`, which lists the files of each case wherever they lie).
"""

import os
from pathlib import Path
from typing import Any

from mimscale import console
from mimscale.errors import DataError
from mimscale.ingest.config import IngestConfig
from mimscale.ingest.sources import cases, dataset_json
from mimscale.ingest.sources.fence import Fence, Target
from mimscale.ingest.sources.files import is_volume
from mimscale.ingest.sources.source import Listing


def is_raw(folder: Path, tree: dict[str, Any] | None) -> bool:
    """True for a folder in this layout; `tree`, its dataset.json, alone does not tell it from Decathlon's."""
    if tree is not None:
        if "file_ending" in tree or "channel_names" in tree:
            return True
        if _lists_whole_names(folder, tree):
            return False
    try:
        images, labels = ([path.name for path in _volumes(folder / name)] for name in ("imagesTr", "labelsTr"))
    except OSError:
        return False
    return cases.have_channel_numbers(images, labels)


def listing(folder: Path, tree: dict[str, Any] | None, config: IngestConfig) -> Listing:
    """The cases of a folder; the channel files of a case are the channels of one source.

    Raises:
        DataError: no case at all, a format that is not read, more channels than dataset.json names, labels that
            match no image.
    """
    tree, path = tree or {}, folder / "dataset.json"
    ending = str(tree.get("file_ending", ""))
    if ending and not is_volume(f"case{ending}"):
        raise DataError(f"{path}: file_ending {ending} is no format of volumes that is read")
    names = dataset_json.channel_names(path, tree)
    fence = Fence(folder, config.allow_outside)
    if "dataset" in tree:
        images, labels = _listed(path, tree["dataset"], fence)
        sources = cases.sources(str(folder), images, labels, config, names)
    else:
        sources = []
        for images_folder, labels_folder in (("imagesTr", "labelsTr"), ("imagesTs", "labelsTs")):
            images = cases.by_case(_files_in(folder / images_folder, fence), channel_numbers=True)
            labels = cases.by_name(_files_in(folder / labels_folder, fence))
            sources += cases.sources(str(folder / images_folder), images, labels, config, names)
    if not sources:
        raise DataError(f"{folder}: imagesTr holds no CASE_0000 volume; give the folder that has imagesTr in it")
    ignored = dataset_json.ignore_value(tree)
    if ignored is not None:
        console.say(f"{path}: label value {ignored} means `ignore`; it is no class and gets no name")
    place = f"a case of {folder}"
    return Listing([(place, source) for source in sources], dataset_json.class_names(path, tree), names)


def _files_in(folder: Path, fence: Fence) -> list[Target]:
    files = []
    for target in fence.targets_in(str(folder)):
        if is_volume(target.path):
            files.append(target)
        elif target.path == str(folder) and target.problem:
            raise DataError(f"{folder}: {target.problem[1]}")
    return files


def _lists_whole_names(folder: Path, tree: dict[str, Any]) -> bool:
    """Decathlon's dataset.json names files that are there; version 1 of nnU-Net leaves the channel number away."""
    training = tree.get("training")
    first = training[0] if isinstance(training, list) and training else None
    image = first.get("image") if isinstance(first, dict) else None
    return not isinstance(image, str) or os.path.exists(os.path.join(folder, image))


def _volumes(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if is_volume(path.name)] if folder.is_dir() else []


def _listed(path: Path, listed: Any, fence: Fence) -> tuple[dict[str, cases.Channels], dict[str, Target]]:
    """The `dataset` of version 2: {CASE: {"images": [FILE, ...], "label": FILE}}."""
    images: dict[str, cases.Channels] = {}
    labels: dict[str, Target] = {}
    try:
        for case, item in listed.items():
            images[case] = {channel: fence.target(file) for channel, file in enumerate(item["images"])}
            if item.get("label"):
                labels[case] = fence.target(item["label"])
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: dataset: entry {len(images)} is not understood ({type(error).__name__}); write "
            '{"CASE": {"images": [FILE, ...], "label": FILE}, ...}'
        ) from None
    if not all(images.values()):
        raise DataError(f"{path}: dataset: a case has an empty list of images")
    return images, labels
