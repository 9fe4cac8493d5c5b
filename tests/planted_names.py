"""Sources with a person's name, dates and identifiers in every field that can hold text.

`write_all` makes one volume a format. Nothing in `PLANTED` may be found in what is made of them: stores, receipts,
logs, reports.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import dicom_samples
import nibabel
import numpy as np
import pydicom
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom.datadict import dictionary_VR, tag_for_keyword

NAME, DATE, NUMBER, UID = "Zebrowski", "19610417", "PID4711", "1.2.826.0.1.3680043.9.4711.1"
PLANTED = (NAME, NAME.upper(), NAME.lower(), DATE, "1961-04-17", NUMBER, UID)
TEXT = f"{NAME} {DATE} {NUMBER}"
_SHORT = f"{NAME}{NUMBER}"  # 16 characters: what the shortest text fields hold
_VALUES: dict[str, Any] = {
    "PN": f"{NAME}^Jan",
    "LO": TEXT,
    "LT": TEXT,
    "ST": TEXT,
    "UT": TEXT,
    "UC": TEXT,
    "SH": _SHORT,
    "CS": _SHORT.upper(),
    "AE": _SHORT,
    "DA": DATE,
    "DT": f"{DATE}101500",
    "AS": "061Y",
    "UI": UID,
}
_KEYWORDS = (
    *("PatientName", "PatientID", "PatientBirthDate", "OtherPatientIDs", "OtherPatientNames", "PatientAddress"),
    *(
        "PatientComments",
        "PatientAge",
        "PatientTelephoneNumbers",
        "EthnicGroup",
        "Occupation",
        "AdditionalPatientHistory",
    ),
    *("AccessionNumber", "StudyID", "StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate", "AcquisitionDateTime"),
    *("InstitutionName", "InstitutionAddress", "InstitutionalDepartmentName", "ReferringPhysicianName"),
    *("PerformingPhysicianName", "OperatorsName", "PhysiciansOfRecord", "RequestingPhysician"),
    *("StationName", "DeviceSerialNumber", "StudyDescription", "SeriesDescription", "ProtocolName", "ImageComments"),
    *("RequestedProcedureDescription", "PerformedProcedureStepDescription", "DerivationDescription", "TextComments"),
    *("Manufacturer", "ManufacturerModelName", "ConvolutionKernel", "BodyPartExamined", "ScanningSequence"),
    *("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "ContrastBolusAgent", "SoftwareVersions"),
)


def dicom_series(folder: Path, voxels: NDArray[Any]) -> list[Path]:
    """Slices [Z, Y, X] with names in every public text field that says nothing about pixels, and in a private one."""
    datasets = dicom_samples.slices(voxels)
    for number, dataset in enumerate(datasets):
        for keyword in _KEYWORDS:
            assert tag_for_keyword(keyword), keyword
            setattr(dataset, keyword, _VALUES[dictionary_VR(keyword)])
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"{UID}.{number}"
        block = dataset.private_block(0x0029, NAME, create=True)
        block.add_new(0x10, "LO", TEXT)
        item = pydicom.Dataset()
        item.PatientName = _VALUES["PN"]
        dataset.RequestAttributesSequence = [item]
    return dicom_samples.save(datasets, folder / f"{NAME}_{DATE}")


def nifti(path: Path, voxels: NDArray[Any], affine: NDArray[Any]) -> Path:
    """A NIfTI file of voxels [X, Y, Z] with names in its texts and in its extensions."""
    image = nibabel.Nifti1Image(voxels, affine)
    for field, width in (("descrip", 79), ("aux_file", 23), ("intent_name", 15), ("db_name", 17), ("data_type", 9)):
        image.header[field] = TEXT[:width].encode()
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", TEXT.encode()))
    dicom = pydicom.Dataset()
    dicom.PatientName, dicom.PatientBirthDate = _VALUES["PN"], DATE
    image.header.extensions.append(nibabel.nifti1.Nifti1DicomExtension(2, dicom))
    path.write_bytes(image.to_bytes())
    return path


def itk(path: Path, voxels: NDArray[Any]) -> Path:
    """An NRRD or MetaImage file of voxels [Z, Y, X] with names in its comments and key/value pairs."""
    image = sitk.GetImageFromArray(voxels)
    for key in ("PatientName", "Comment", NAME, "StudyDate"):
        image.SetMetaData(key, TEXT)
    sitk.WriteImage(image, str(path))
    data = path.read_bytes()
    if path.suffix == ".nrrd":
        head, body = data.split(b"\n\n", 1)
        path.write_bytes(head + f"\n# {TEXT}\ncontent: {TEXT}\npatient:={TEXT}\n\n".encode() + body)
    else:
        path.write_bytes(
            data.replace(b"NDims", f"Comment = {TEXT}\nName = {TEXT}\nAcquisitionDate = {DATE}\nNDims".encode(), 1)
        )
    return path


def write_all(folder: Path, voxels: NDArray[Any]) -> dict[str, list[Path]]:
    """One volume of voxels [Z, Y, X] a format, in folders and files that are named like a person."""
    home = folder / f"{NAME}_{NUMBER}"
    home.mkdir(parents=True)
    stem = f"{NAME}-{DATE}"
    made = {
        "dicom": dicom_series(home, voxels),
        "nii": [nifti(home / f"{stem}.nii", voxels.T, np.diag([1.0, 2, 3, 1]))],
    }
    for suffix in ("nrrd", "mha"):
        made[suffix] = [itk(home / f"{stem}.{suffix}", voxels)]
    np.save(home / f"{stem}.npy", voxels)
    (home / f"{stem}.json").write_text(json.dumps({"spacing_mm": [3, 2, 1], "patient": TEXT}))
    made["npy"] = [home / f"{stem}.npy", home / f"{stem}.json"]
    return made


def found_in(content: bytes | str) -> list[str]:
    """What of `PLANTED` is in there."""
    data = content.encode() if isinstance(content, str) else content
    return [word for word in PLANTED if word.encode() in data]


def found_below(folder: Path) -> dict[Path, list[str]]:
    """Files of a folder, and their names, that hold something planted."""
    paths: Iterable[Path] = (path for path in folder.rglob("*") if path.is_file())
    hits = {path: found_in(path.read_bytes()) + found_in(str(path.relative_to(folder))) for path in paths}
    return {path: words for path, words in hits.items() if words}
