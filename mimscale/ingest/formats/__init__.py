"""One reader a format: the bytes of a source -> voxels in the file's own order, or a typed reason why not."""

from collections.abc import Callable, Sequence
from pathlib import Path

from mimscale.ingest.formats import metaimage, nrrd
from mimscale.ingest.formats.detached import beside
from mimscale.ingest.formats.dicom import read_dicom
from mimscale.ingest.formats.metaimage import read_metaimage
from mimscale.ingest.formats.mgh import read_mgh
from mimscale.ingest.formats.nifti import read_nifti
from mimscale.ingest.formats.nrrd import read_nrrd
from mimscale.ingest.formats.numpy_file import read_numpy
from mimscale.ingest.formats.reasons import REASONS, QuarantineError
from mimscale.ingest.formats.scan import ReadOptions, Scan, SourceFile
from mimscale.ingest.formats.text_header import HEADER_BYTES

__all__ = [
    "REASONS",
    "SUFFIXES",
    "QuarantineError",
    "ReadOptions",
    "Scan",
    "SourceFile",
    "companions",
    "read_scan",
]

_READERS: dict[str, Callable[[Sequence[SourceFile], ReadOptions], Scan]] = {
    ".nii.gz": read_nifti,
    ".nii": read_nifti,
    ".hdr": read_nifti,
    ".nrrd": read_nrrd,
    ".nhdr": read_nrrd,
    ".mha": read_metaimage,
    ".mhd": read_metaimage,
    ".mgz": read_mgh,
    ".mgh": read_mgh,
    ".npy": read_numpy,
    ".npz": read_numpy,
}
SUFFIXES = tuple(_READERS)  # of files that are a volume each; DICOM needs no suffix


def read_scan(files: Sequence[SourceFile], options: ReadOptions) -> Scan:
    """Decode one volume.

    Args:
        files: all files of it: one, or that one and its `companions`, or the slices of a DICOM series in any order.
        options: see `ReadOptions`.

    Raises:
        QuarantineError: with one of REASONS.
    """
    assert files, "a source has at least one file"
    if not all(file.data for file in files):
        raise QuarantineError("empty_file", "0 bytes")
    name = files[0].path.name.lower()
    reader = next((reader for suffix, reader in _READERS.items() if name.endswith(suffix)), read_dicom)
    try:
        return reader(files, options)
    except MemoryError:
        raise QuarantineError("too_large", "it does not fit into the memory that is left") from None


def companions(path: Path) -> tuple[Path, ...]:
    """Further files that belong to a volume file: the .img of a .hdr, what an .mhd or .nhdr names, an existing .json.

    Only a header is read. What it names need not be there.

    Raises:
        QuarantineError: outside_source when a header names a file outside its folder, or unsupported_encoding.
        OSError: the header cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix == ".hdr":
        return (path.with_suffix(".IMG" if path.suffix.isupper() else ".img"),)
    if suffix in (".npy", ".npz"):
        sidecar = path.with_suffix(".json")
        return (sidecar,) if sidecar.is_file() else ()
    kind = {".nhdr": nrrd, ".nrrd": nrrd, ".mhd": metaimage, ".mha": metaimage}.get(suffix)
    if kind is None:
        return ()
    with path.open("rb") as file:
        head = file.read(HEADER_BYTES)
    try:
        name = kind.detached_name(kind.parse_header(head)[0])
    except QuarantineError as error:
        if error.reason in ("unreadable", "truncated"):
            return ()  # the reader says what is wrong with it
        raise
    return () if name is None else (beside(path, name),)
