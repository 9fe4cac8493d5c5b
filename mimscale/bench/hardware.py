"""What a machine can do and what a benchmark took of it: peaks, memory, energy, time on a device."""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from mimscale.bench.gpus import GPUS
from mimscale.train.environment import memory_peak_bytes

MFU_FORMULA = (
    "FLOPs of the products that the step needs (no masked token, nothing that is recomputed) / seconds / "
    "(peak FLOP/s x devices)"
)
HFU_FORMULA = "the same with what is recomputed: attention's scores in the backward pass, blocks under checkpointing"
_PRODUCT_EDGE = {"cpu": 1536, "cuda": 8192}


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Wall time of a call, with what it left to the device."""
    synchronise(device)
    start = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - start


def device_name(device: torch.device) -> str:
    """The GPU's name; the CPU is named in a result's surroundings."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def peak_flops_per_s(name: str, dtype: torch.dtype) -> float | None:
    """Dense products of a device by its data sheet, with fp32 sums; None where none is known.

    The whole name must be that of the data sheet: an RTX A4000 is no A40, and a part of an A100 (MIG) no A100.
    """
    gpu = next((gpu for gpu in GPUS.values() if gpu.device_name == name.removeprefix("NVIDIA ")), None)
    if gpu is None or dtype not in (torch.bfloat16, torch.float32):
        return None
    return (gpu.bf16_tflops if dtype == torch.bfloat16 else gpu.fp32_tflops) * 1e12


def measured_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """The best rate of one large square product on this device, with the threads of this process."""
    edge = _PRODUCT_EDGE[device.type]
    left, right = (torch.randn(edge, edge, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(left)
    torch.mm(left, right, out=out)
    return 2 * edge**3 / min(seconds_of(lambda: torch.mm(left, right, out=out), device) for _ in range(7))


def utilisation(
    *,
    flops: float,
    hardware_flops: float,
    seconds: float,
    devices: int,
    name: str,
    dtype: torch.dtype,
    measured: float,
) -> dict[str, Any]:
    """MFU and HFU against the data sheet (where the device has one) and against a large product measured here.

    Args:
        flops: that the step needs.
        hardware_flops: that the step did.
        seconds: that it took.
        devices: that did it.
        name: of the device, as `device_name` tells it.
        dtype: that products are computed in.
        measured: FLOP/s of a large product in this type on one device.
    """
    sheet = peak_flops_per_s(name, dtype)

    def share(numerator: float, peak: float | None) -> float | None:
        return None if peak is None else float(f"{numerator / seconds / (peak * devices):.4g}")

    return {
        "mfu": share(flops, sheet),
        "hfu": share(hardware_flops, sheet),
        "mfu_of_measured": share(flops, measured),
        "hfu_of_measured": share(hardware_flops, measured),
        "peak_flops_per_s": sheet,
        "measured_flops_per_s": round(measured),
        "mfu_formula": MFU_FORMULA,
        "hfu_formula": HFU_FORMULA,
    }


def memory_of(device: torch.device) -> dict[str, int]:
    """The most that this process has held so far, in bytes."""
    memory = {"host_peak_bytes": memory_peak_bytes()}
    if device.type == "cuda":
        memory["device_peak_bytes"] = torch.cuda.max_memory_allocated(device)
        memory["device_reserved_bytes"] = torch.cuda.max_memory_reserved(device)
        memory["alloc_retries"] = torch.cuda.memory_stats(device)["num_alloc_retries"]
    return memory


def energy_j(device: torch.device) -> float | None:
    """Joules that the GPU has used since its driver was loaded; None without NVML."""
    if device.type != "cuda":
        return None
    with suppress(ImportError, RuntimeError):
        import pynvml

        with suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            # A visible device has another number for NVML, which does not know CUDA_VISIBLE_DEVICES; its UUID has not.
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByUUID(uuid))) / 1e3
    return None
