"""What a result says about the machine: the driver of the GPU and NCCL too, where there are any."""

import pytest
import torch

from mimscale.bench import measure

DRIVERS = {
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version: 12\n": (
        "535.104.05"
    ),
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs-builder)\n": "570.86.15",
    "something else\n": "unknown",
}


@pytest.mark.parametrize(("text", "version"), DRIVERS.items())
def test_the_driver_is_the_kernel_modules(text, version, tmp_path):
    file = tmp_path / "version"
    file.write_text(text)
    assert measure.gpu_driver_version(file) == version


def test_a_machine_without_a_gpu_has_neither_driver_nor_nccl(monkeypatch, tmp_path):
    assert measure.gpu_driver_version(tmp_path / "none") is None
    monkeypatch.setattr(measure, "gpu_driver_version", lambda: None)
    where = measure.surroundings()
    assert (where["gpu_driver"], where["nccl"]) == (None, None)


def test_nccl_is_that_of_torch(monkeypatch):
    monkeypatch.setattr(measure, "gpu_driver_version", lambda: "570.86.15")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert measure.surroundings()["nccl"] is None  # a build for CPUs on a machine with a GPU
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))
    where = measure.surroundings()
    assert (where["gpu_driver"], where["nccl"]) == ("570.86.15", "2.27.3")
