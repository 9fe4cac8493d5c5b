"""Patterns: `/data/**/*.nii.gz`, and {images: GLOB, labels: GLOB}."""

import glob
import os
from pathlib import Path

from mimscale.errors import DataError
from mimscale.ingest.config import ImageLabelGlobs, IngestConfig
from mimscale.ingest.sources import cases, folder
from mimscale.ingest.sources.fence import typed
from mimscale.ingest.sources.files import is_volume
from mimscale.ingest.sources.source import Listing, Source, subject_of


def listing(pattern: str, config: IngestConfig) -> Listing:
    """Every file that matches; where only folders do, what is in them.

    Raises:
        DataError: nothing matches.
    """
    place = f"sources={pattern}"
    paths = _expand(pattern)
    files = [path for path in paths if _is_file(path)]
    if not files:
        folders = [path for path in paths if os.path.isdir(path)]
        if not folders and not glob.has_magic(pattern):
            raise DataError(f"{place}: no such file or folder")
        if not folders:
            raise DataError(f"{place}: matches no file; quote it, so that the shell leaves the pattern alone")
        return folder.listing(pattern, [Path(path) for path in folders], config)
    sources, strangers = folder.sort_files(files, config, any_name=True)
    for path in strangers:  # the pattern asks for it: it gets an answer
        problem = ("not_dicom", "its name has no suffix of a volume, and it is no DICOM file")
        subject = subject_of(path, config.subject_pattern)
        sources.append(Source(channels=((path,),), subject=subject, problem=problem))
    return Listing([(place, source) for source in sources])


def pairs(globs: ImageLabelGlobs, config: IngestConfig) -> Listing:
    """Images and labels with the same file names.

    Raises:
        DataError: a pattern matches nothing, two files have one name, not one label has an image.
    """
    files = {}
    for key in ("images", "labels"):
        pattern = getattr(globs, key)
        files[key] = [path for path in _expand(pattern) if is_volume(path)]
        if not files[key]:
            raise DataError(f"sources.{key}={pattern}: matches no volume")
    channel_numbers = cases.have_channel_numbers(files["images"], files["labels"])
    images = cases.by_case([typed(path) for path in files["images"]], channel_numbers)
    labels = cases.by_name([typed(path) for path in files["labels"]])
    place = f"sources.images={globs.images}, labels={globs.labels}"
    return Listing([(place, source) for source in cases.sources(place, images, labels, config)])


def _expand(pattern: str) -> list[str]:
    return sorted(set(glob.glob(str(Path(pattern).expanduser()), recursive=True)))


def _is_file(path: str) -> bool:
    return is_volume(path) or os.path.isfile(path)  # asks the file system only where the name leaves it open
