"""From what a user wrote as `sources` to a sorted list of images and labels, and to a plan of parts."""

import glob
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mimscale import durable
from mimscale.errors import DataError
from mimscale.ingest.config import ImageLabel, ImageLabelGlobs, IngestConfig, Sources
from mimscale.ingest.formats import SUFFIXES


@dataclass(frozen=True)
class Found:
    """What `sources` stands for."""

    pairs: tuple[ImageLabel, ...]
    sources: "tuple[Source, ...]" = ()
    class_names: tuple[str, ...] = ()  # as a dataset.json gives them


@dataclass(frozen=True, kw_only=True)
class Source:
    channels: tuple[tuple[str, ...], ...]
    label: tuple[str, ...] = ()
    subject: str
    modality: str | None = None
    split: str | None = None
    tags: dict[str, str] = field(default_factory=dict)
    problem: tuple[str, str] | None = None


def stem(path: str) -> str:
    """File name without folder and without `.nii.gz`, `.nii` or `.npy`."""
    name = Path(path).name
    for suffix in SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def find(sources: Sources, config: IngestConfig) -> Found:
    """Expand `sources`.

    Raises:
        DataError: a pattern that matches nothing, a folder without volumes, a dataset.json that cannot be read.
    """
    found = _find(sources)
    pairs = sorted(set(found.pairs), key=lambda pair: (pair.image, pair.label or ""))
    out = []
    for pair in pairs:
        files = (pair.image,) + ((str(Path(pair.image).with_suffix(".json")),) if pair.image.endswith(".npy") else ())
        label = (pair.label,) if pair.label else ()
        out.append(Source(channels=(files,), label=label, subject=subject_of(pair.image, config.subject_pattern)))
    return Found(tuple(pairs), tuple(out), found.class_names)


def _find(sources: Sources) -> Found:
    if isinstance(sources, ImageLabelGlobs):
        return Found(_pair_by_stem(_expand(sources.images), _expand(sources.labels), sources))
    if isinstance(sources, str):
        path = Path(sources).expanduser()
        if path.is_dir():
            return _decathlon(path / "dataset.json") if (path / "dataset.json").is_file() else Found(_folder(path))
        if path.suffix == ".json":
            return _decathlon(path)
        return Found(tuple(ImageLabel(image=image) for image in _expand(sources)))
    if not sources:
        raise DataError("sources=[]: the list is empty; give globs, or {image: FILE, label: FILE}")
    pairs: list[ImageLabel] = []
    names: tuple[str, ...] = ()
    for source in sources:
        found = Found((source,)) if isinstance(source, ImageLabel) else _find(source)
        if found.class_names and names and found.class_names != names:
            raise DataError(f"sources: class names {found.class_names} of {source} are not {names}, those before it")
        names = names or found.class_names
        pairs += found.pairs
    return Found(tuple(pairs), (), names)


def _expand(pattern: str) -> list[str]:
    paths = sorted(path for path in glob.glob(str(Path(pattern).expanduser()), recursive=True) if Path(path).is_file())
    if not paths and not glob.has_magic(pattern):
        raise DataError(f"sources={pattern}: no such file or folder; give one that exists, or a glob")
    if not paths:
        raise DataError(f"sources={pattern}: matches no file; quote it, so that the shell leaves the pattern alone")
    return paths


def _folder(folder: Path) -> tuple[ImageLabel, ...]:
    paths = [path for path in sorted(folder.rglob("*")) if path.name.lower().endswith(SUFFIXES) and path.is_file()]
    if not paths:
        raise DataError(f"sources={folder}: the folder holds no {', '.join(SUFFIXES)} file")
    return tuple(ImageLabel(image=str(path)) for path in paths if not path.name.startswith("."))


def _pair_by_stem(images: list[str], labels: list[str], sources: ImageLabelGlobs) -> tuple[ImageLabel, ...]:
    image_of, label_of = _by_stem(images, sources.images), _by_stem(labels, sources.labels)
    orphans = sorted(label_of.keys() - image_of.keys())
    if orphans:
        raise DataError(
            f"sources.labels={sources.labels}: {len(orphans)} label(s) without an image of the same name, first "
            f"{label_of[orphans[0]]}; give pairs as [{{image: FILE, label: FILE}}, ...] where names differ"
        )
    return tuple(ImageLabel(image=image, label=label_of.get(name)) for name, image in image_of.items())


def _by_stem(paths: list[str], pattern: str) -> dict[str, str]:
    named: dict[str, str] = {}
    for path in paths:
        name = re.sub(r"_0000$", "", stem(path))  # nnU-Net's channel number, which its labels do not carry
        if name in named:
            raise DataError(
                f"{pattern}: {named[name]} and {path} have one name, so labels cannot be paired by it; "
                "give pairs as [{image: FILE, label: FILE}, ...]"
            )
        named[name] = path
    return named


def _decathlon(path: Path) -> Found:
    """A Medical Segmentation Decathlon dataset.json: labelled `training`, unlabelled `test`, named `labels`."""
    with durable.explained(DataError, path, "give the dataset.json of a Decathlon data set"):
        text = path.read_bytes()
    folder = path.parent
    try:
        tree = json.loads(text)
        pairs = [
            ImageLabel(
                image=str(folder / item["image"]), label=str(folder / item["label"]) if "label" in item else None
            )
            for item in tree.get("training", [])
        ]
        pairs += [ImageLabel(image=str(folder / item)) for item in tree.get("test", [])]
        numbered = {int(value): str(name) for value, name in tree.get("labels", {}).items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: not a Decathlon dataset.json ({error!r}); it needs training: [{{image, label}}, ...] and "
            'labels: {"0": "background", ...}'
        ) from None
    if not pairs:
        raise DataError(f"{path}: lists no volume under training or test")
    if sorted(numbered) != list(range(len(numbered))):
        raise DataError(f"{path}: labels {sorted(numbered)} must run 0, 1, 2, ... without a gap")
    return Found(tuple(pairs), (), tuple(numbered[value] for value in range(len(numbered))))


def subject_of(image: str, pattern: str) -> str:
    """The subject that a file name stands for: the first group of `pattern` that matches, else the whole stem."""
    name = stem(image)
    match = re.search(pattern, name)
    groups = [group for group in match.groups() if group] if match else []
    return str(groups[0]) if groups else name


