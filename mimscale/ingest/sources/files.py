"""Which files are volumes, which may be DICOM slices, and which further files a volume needs."""

import os
from pathlib import Path

from mimscale.ingest.formats import SUFFIXES, QuarantineError, companions

Problem = tuple[str, str]  # typed reason and detail; the detail names no file

_ALONE = (".nii", ".nii.gz", ".mgz", ".mgh")  # need nothing else; most files are these, and a Path of each takes time
DICOM_SUFFIXES = (".dcm", ".ima", ".dicom")


def is_volume(name: str) -> bool:
    """True for the name of a file that holds a volume, as far as a name can tell. DICOM slices are no volumes."""
    return name.lower().endswith(SUFFIXES)


def may_be_dicom(name: str) -> bool:
    """True for names that DICOM files have: a suffix of theirs, none, or a UID (`MR.1.2.840.10008`)."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix in DICOM_SUFFIXES or suffix[1:].isdigit() or not suffix


def companions_of(path: str) -> tuple[tuple[str, ...], Problem | None]:
    """Files that a volume cannot be read without (the .img of a .hdr ...), or why they cannot be told."""
    if path.endswith(_ALONE):
        return (), None
    try:
        return tuple(map(str, companions(Path(path)))), None
    except QuarantineError as error:
        return (), (error.reason, error.detail)
    except FileNotFoundError:
        return (), ("missing_file", "no such file")
    except OSError as error:
        return (), ("unreadable", str(error.strerror))
