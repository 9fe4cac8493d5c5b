"""No name, date or identifier of a person leaves a reader, neither with a volume nor with a reason."""

import logging
import warnings

import numpy as np
import planted_names
import pytest

from mimscale.ingest.formats import QuarantineError, ReadOptions, SourceFile, read_scan

VOXELS = np.random.default_rng(0).integers(-50, 900, (5, 6, 7)).astype(np.int16)
FORMATS = ["dicom", "nii", "nrrd", "mha", "npy"]


def sources(folder, name):
    paths = planted_names.write_all(folder, VOXELS)[name]
    return [SourceFile(path, path.read_bytes()) for path in paths]


@pytest.mark.parametrize("name", FORMATS)
def test_a_scan_carries_no_name(tmp_path, name):
    files = sources(tmp_path, name)
    assert any(planted_names.found_in(file.data) for file in files)  # the names are there
    scan = read_scan(files, ReadOptions())
    assert np.array_equal(scan.voxels[0].T, VOXELS)
    assert planted_names.found_in(repr((dict(scan.header), scan.warnings, scan.modality))) == []


@pytest.mark.parametrize("name", FORMATS)
def test_neither_reasons_nor_logs_quote_a_damaged_header(tmp_path, name, caplog):
    caplog.set_level(logging.DEBUG)
    files = sources(tmp_path, name)
    random = np.random.default_rng(1)
    details = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(150):
            data = bytearray(files[0].data)
            start = data.find(b"DICM") + 1
            for place in random.integers(start, min(len(data), start + 1500), 3):
                data[place] = random.integers(256)
            try:
                read_scan([SourceFile(files[0].path, bytes(data)), *files[1:]], ReadOptions())
            except QuarantineError as error:
                details.append(f"{error} {error.__cause__} {error.detail}")
    assert details
    assert planted_names.found_in("\n".join(details)) == []
    assert planted_names.found_in(caplog.text) == []
    assert planted_names.found_in("".join(str(one.message) for one in said)) == []
