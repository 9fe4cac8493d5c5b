"""Voxels in another file than their header, which names it."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from mimscale.ingest.formats.reasons import QuarantineError
from mimscale.ingest.formats.scan import SourceFile


def beside(header: Path, name: str) -> Path:
    """The path of the file `name` that a header names.

    Raises:
        QuarantineError: outside_source for a name that leads out of the header's folder.
    """
    path, foreign = PurePosixPath(name), PureWindowsPath(name)
    if path.is_absolute() or foreign.drive or foreign.root or ".." in foreign.parts or not path.parts or "\0" in name:
        raise QuarantineError("outside_source", "the header names a data file outside its own folder")
    return header.parent / path


def data_file(files: Sequence[SourceFile], header: SourceFile, name: str) -> SourceFile:
    """Of `files` the one that `header` names.

    Raises:
        QuarantineError: outside_source, or missing_file.
    """
    path = beside(header.path, name)
    for file in files:
        if file is not header and file.path.name == path.name:
            return file
    raise QuarantineError("missing_file", "the data file that the header names is not there")
