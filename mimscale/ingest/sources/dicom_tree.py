"""DICOM files -> series, each one volume; folders of lists -> the series in them."""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mimscale.errors import DataError
from mimscale.ingest.config import IngestConfig
from mimscale.ingest.formats.dicom_series import Series, find_series
from mimscale.ingest.sources.cases import first_problem
from mimscale.ingest.sources.fence import Fence
from mimscale.ingest.sources.files import DICOM_SUFFIXES, Problem
from mimscale.ingest.sources.source import Listing, Source, modality_of, subject_of


def sources(files: Iterable[str], config: IngestConfig) -> tuple[list[Source], list[str]]:
    """The series among `files`, and the files that are no DICOM, though a name like theirs may be.

    Only headers are read, by `config.workers` processes when there are many. What is DICOM and no volume, or has a
    suffix of DICOM and is none, is a source with a problem.
    """
    listed, strangers = [], []
    for series in find_series(map(Path, files), config.workers):
        paths = tuple(map(str, series.files))
        if series.problem is None or series.subject:
            listed.append(_source(series, paths, config))
            continue
        for path in paths:  # of files without a readable header each stands for itself
            if series.problem[0] == "not_dicom" and not path.lower().endswith(DICOM_SUFFIXES):
                strangers.append(path)
            else:
                listed.append(_source(series, (path,), config))
    return listed, strangers


def is_directory(path: str) -> bool:
    """True for the name of a DICOMDIR, which lists the DICOM files of a medium."""
    return os.path.basename(path).upper() == "DICOMDIR"


def dicomdir(path: Path, config: IngestConfig) -> Listing:
    """The series of the files that a DICOMDIR names.

    Raises:
        DataError: there is no such file, or it names none.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; give the DICOMDIR or the folder that holds it")
    found, _ = sources([str(path)], config)
    if not found:
        raise DataError(f"{path}: names no DICOM file; give the folder that holds the files instead")
    fence = Fence(path.parent, config.allow_outside)
    checked = []
    for source in found:
        problems = [fence.target(os.path.relpath(file, path.parent)).problem for file in source.channels[0]]
        problem = next((one for one in problems if one and one[0] == "outside_source"), None)
        checked.append(dataclasses.replace(source, problem=problem or source.problem))
    return Listing([(f"sources={path}", source) for source in checked])


def open_folders(
    entries: Sequence[tuple[str, Source]], folders: Mapping[str, Fence], config: IngestConfig
) -> list[tuple[str, Source]]:
    """Put the files of the one series in a folder where a list names the folder.

    `folders`: those that are named, each with the fence that its files must not leave.
    """
    if not folders:
        return list(entries)
    targets = {folder: list(fence.targets_in(folder)) for folder, fence in folders.items()}
    closed = {folder: first_problem(found) for folder, found in targets.items()}
    # Folder by folder: a copy of a series in another folder is a row of its own.
    inside = {
        folder: find_series({Path(one.path) for one in found if not one.is_folder and not one.problem}, config.workers)
        for folder, found in targets.items()
    }
    opened = []
    for place, source in entries:
        if not any(channel[0] in folders for channel in source.channels):
            opened.append((place, source))
            continue
        chosen = {
            channel[0]: closed[channel[0]] or _only_volume(inside[channel[0]])
            for channel in source.channels
            if channel[0] in folders
        }
        volumes = [one for one in chosen.values() if isinstance(one, Series)]
        named = next((series.subject for series in volumes if series.subject), "")
        opened.append(
            (
                place,
                dataclasses.replace(
                    source,
                    channels=tuple(
                        tuple(map(str, one.files)) if isinstance(one := chosen.get(channel[0]), Series) else channel
                        for channel in source.channels
                    ),
                    subject=source.subject or named or subject_of(source.channels[0][0], config.subject_pattern),
                    modality=source.modality or next((modality_of(series.modality or "") for series in volumes), None),
                    problem=source.problem or next((one for one in chosen.values() if isinstance(one, tuple)), None),
                ),
            )
        )
    return opened


def _only_volume(found: Sequence[Series]) -> Series | Problem:
    volumes = [series for series in found if series.problem is None]
    if len(volumes) == 1:
        return volumes[0]
    if volumes:
        return ("several_series", f"the folder holds {len(volumes)} series; give each a folder or list their files")
    problems = [series.problem for series in found if series.problem is not None]
    return problems[0] if problems else ("not_an_image", "the folder holds no DICOM file")


def _source(series: Series, files: tuple[str, ...], config: IngestConfig) -> Source:
    return Source(
        channels=(files,),
        subject=series.subject or subject_of(os.path.dirname(files[0]), config.subject_pattern),
        modality=modality_of(series.modality or ""),
        problem=series.problem,
    )
