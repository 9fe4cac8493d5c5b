"""A folder and all below it, and the files of a pattern: volumes by their suffix, DICOM series by their headers."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mimscale import console
from mimscale.errors import DataError
from mimscale.ingest.config import IngestConfig
from mimscale.ingest.formats import SUFFIXES
from mimscale.ingest.sources import dicom_tree
from mimscale.ingest.sources.fence import Fence, typed
from mimscale.ingest.sources.files import Problem, is_volume, may_be_dicom
from mimscale.ingest.sources.source import Listing, Source, subject_of


@dataclass
class _Walk:
    files: list[str] = field(default_factory=list)
    problems: list[tuple[str, Problem]] = field(default_factory=list)
    links_not_followed: int = 0


def listing(typed_source: str, folders: Sequence[Path], config: IngestConfig) -> Listing:
    """Every volume and every DICOM series below `folders`. Hidden files and folders are passed over.

    Raises:
        DataError: there is none.
    """
    walk = _Walk()
    for folder in folders:
        _walk_into(walk, folder, config)
    place = f"sources={typed_source}"
    sources, strangers = sort_files(walk.files, config, any_name=False)
    if walk.links_not_followed:
        console.say(
            f"{place}: {walk.links_not_followed} linked folder(s) lead out of it and were not entered; "
            "allow_outside=true enters them"
        )
    if strangers:
        console.say(f"{place}: {len(strangers)} file(s) are no volumes and were left out")
    sources += [
        Source(channels=((path,),), subject=subject_of(path, config.subject_pattern), problem=problem)
        for path, problem in walk.problems
    ]
    if not sources:
        raise DataError(f"{place}: the folder holds no {', '.join(SUFFIXES)} file and no DICOM series")
    return Listing([(place, source) for source in sources])


def sort_files(files: list[str], config: IngestConfig, *, any_name: bool) -> tuple[list[Source], list[str]]:
    """Volumes and DICOM series among `files`, and the files that are neither nor belong to one.

    `any_name`: look for DICOM in files of every name, not only in those with a suffix of it, a UID or no suffix.
    """
    volumes = [typed(path) for path in files if is_volume(path)]
    attached = {companion for volume in volumes for companion in volume.companions}
    sources = [
        Source(
            channels=(volume.files,),
            subject=subject_of(volume.path, config.subject_pattern),
            problem=volume.problem,
        )
        for volume in volumes
        if volume.path not in attached
    ]
    rest = [path for path in files if path not in attached and not is_volume(path)]
    if any_name:
        for path in filter(dicom_tree.is_directory, rest):
            sources += [source for _, source in dicom_tree.dicomdir(Path(path), config).entries]
    # What the DICOMDIR of a folder names is found there anyway, and not behind links that leave the folder.
    rest = [path for path in rest if not dicom_tree.is_directory(path)]
    slices = [path for path in rest if any_name or may_be_dicom(path)]
    strangers = [] if any_name else [path for path in rest if not may_be_dicom(path)]
    series, no_dicom = dicom_tree.sources(slices, config)
    return sources + series, sorted(strangers + no_dicom)


def _walk_into(walk: _Walk, folder: Path, config: IngestConfig) -> None:
    fence = Fence(folder, config.allow_outside)
    entered: set[str] = set()  # linked folders, by real path: links may form a ring
    todo = [str(folder)]
    while todo:
        current = todo.pop()
        try:
            with os.scandir(current) as found:
                entries = sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda one: one.name)
        except OSError as error:
            walk.problems.append((current, ("unreadable", f"the folder cannot be listed: {error.strerror}")))
            continue
        for entry in entries:
            if entry.is_symlink():
                todo += _follow(entry.path, fence, walk, entered)
            elif entry.is_dir(follow_symlinks=False):
                todo.append(entry.path)
            else:
                walk.files.append(entry.path)


def _follow(path: str, fence: Fence, walk: _Walk, entered: set[str]) -> Iterable[str]:
    """Yield a linked folder that is to be entered: one that is not walked anyway. Other links are files."""
    target = fence.target(path)
    real = os.path.realpath(path)
    if os.path.isdir(real):
        if target.problem:
            walk.links_not_followed += 1
        elif not fence.is_below(real) and real not in entered:
            entered.add(real)
            yield path
    elif target.problem is None:
        walk.files.append(path)
    elif is_volume(path) or may_be_dicom(path):
        walk.problems.append((path, target.problem))
