"""A Medical Segmentation Decathlon dataset.json: labelled `training`, `validation`, unlabelled `test`."""

from pathlib import Path
from typing import Any

from mimscale.errors import DataError
from mimscale.ingest.config import IngestConfig
from mimscale.ingest.sources import dataset_json
from mimscale.ingest.sources.cases import first_problem
from mimscale.ingest.sources.fence import Fence
from mimscale.ingest.sources.source import Listing, Source, modality_of_channels, subject_of


def listing(path: Path, tree: dict[str, Any], config: IngestConfig) -> Listing:
    """The volumes of a dataset.json at `path`.

    A 4-D image with several `modality` entries is one source: the file holds the channels. MONAI's variants are read
    too: `validation` beside `training` fixes the split, an `image` may be a list of channels.

    Raises:
        DataError: entries that are not understood (by their number), or no entry at all.
    """
    channel_names = dataset_json.channel_names(path, tree)
    modality = modality_of_channels(channel_names)
    fence = Fence(path.parent, config.allow_outside)
    has_split = bool(tree.get("validation"))
    entries = []
    for part, split in (("training", "train"), ("validation", "val"), ("test", None)):
        items = tree.get(part) or []
        if not isinstance(items, list):
            raise DataError(f"{path}: {part} must be a list, not a {type(items).__name__}")
        for number, item in enumerate(items):
            place = f"{part}[{number}] of {path}"
            images, label = _files(item, place)
            targets = [fence.target(image) for image in images]
            labels = [fence.target(label)] if label else []
            source = Source(
                channels=tuple(target.files for target in targets),
                label=labels[0].files if labels else (),
                subject=subject_of(images[0], config.subject_pattern),
                modality=modality,
                split=split if has_split else None,
                problem=first_problem(targets + labels),
            )
            entries.append((place, source))
    if not entries:
        raise DataError(f"{path}: lists no volume under training, validation or test")
    return Listing(entries, dataset_json.class_names(path, tree), channel_names)


def _files(item: Any, place: str) -> tuple[list[str], str | None]:
    """Image files and label file of one entry: FILE, or {"image": FILE or [FILE, ...], "label": FILE}."""
    image, label = (item.get("image"), item.get("label")) if isinstance(item, dict) else (item, None)
    images = image if isinstance(image, list) else [image]
    files = [file for file in images if isinstance(file, str) and file]
    if not images or len(files) < len(images):
        raise DataError(f'{place}: not an entry of a Decathlon dataset.json; write {{"image": FILE, "label": FILE}}')
    if label is not None and not (isinstance(label, str) and label):
        raise DataError(f"{place}: its label is no file name; leave label away where there is none")
    return files, label
