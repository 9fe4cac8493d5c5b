import hashlib
import io

import pytest
import safetensors.torch
import torch

from mimscale.models.tensor_file import DTYPES, write_tensors


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_library_reads_what_is_written_and_the_hash_is_that_of_the_file(dtype, tmp_path):
    values = torch.arange(24).reshape(2, 3, 4).to(dtype)
    tensors = {"a": values, "turned": values.transpose(0, 2), "one": values[1, 2, 3], "none": values[:0]}
    with (tmp_path / "file").open("wb") as file:
        sha256 = write_tensors(file, tensors)
    written = (tmp_path / "file").read_bytes()
    assert sha256 == hashlib.sha256(written).hexdigest()
    read = safetensors.torch.load(written)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], values) for name, values in tensors.items())
    assert all(read[name].dtype == dtype for name in tensors)


def test_no_tensors_are_a_file_too():
    file = io.BytesIO()
    write_tensors(file, {})
    assert safetensors.torch.load(file.getvalue()) == {}
