"""GPUs that a run may be planned for: what they compute, hold and send, as their makers' data sheets give it."""

from dataclasses import dataclass

from mimscale.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU and the node that it usually comes in."""

    device_name: str  # as torch.cuda.get_device_name tells it, without "NVIDIA "
    bf16_tflops: float  # dense products with fp32 sums, without sparsity
    fp32_tflops: float  # without TF32, as torch multiplies fp32 by default
    memory_gib: float
    peer_gb_per_s: float  # to the other GPUs of its node, one direction: NVLink, else PCIe
    source: str
    gpus_per_node: int = 8
    # Of a node to other nodes, one direction. An assumption about the cluster, not about the GPU: eight links of
    # 200 Gbit/s for A100, of 400 Gbit/s for H100 and H200, as in DGX; one link of 200 Gbit/s for PCIe cards.
    network_gb_per_s: float


GPUS = {
    "a40": Gpu(
        device_name="A40",
        bf16_tflops=149.7,
        fp32_tflops=37.4,
        memory_gib=48,
        peer_gb_per_s=32,
        network_gb_per_s=25,
        gpus_per_node=4,
        source="NVIDIA A40 data sheet; PCIe 4.0 x16",
    ),
    "a100-40g": Gpu(
        device_name="A100-SXM4-40GB",
        bf16_tflops=312,
        fp32_tflops=19.5,
        memory_gib=40,
        peer_gb_per_s=300,
        network_gb_per_s=200,
        source="NVIDIA A100 data sheet, SXM",
    ),
    "a100-80g": Gpu(
        device_name="A100-SXM4-80GB",
        bf16_tflops=312,
        fp32_tflops=19.5,
        memory_gib=80,
        peer_gb_per_s=300,
        network_gb_per_s=200,
        source="NVIDIA A100 data sheet, SXM",
    ),
    "a100-pcie": Gpu(
        device_name="A100 80GB PCIe",
        bf16_tflops=312,
        fp32_tflops=19.5,
        memory_gib=80,
        peer_gb_per_s=32,
        network_gb_per_s=25,
        gpus_per_node=4,
        source="NVIDIA A100 data sheet, PCIe 4.0 x16",
    ),
    "h100": Gpu(
        device_name="H100 80GB HBM3",
        bf16_tflops=989,
        fp32_tflops=67,
        memory_gib=80,
        peer_gb_per_s=450,
        network_gb_per_s=400,
        source="NVIDIA H100 data sheet, SXM",
    ),
    "h100-pcie": Gpu(
        device_name="H100 PCIe",
        bf16_tflops=756,
        fp32_tflops=51,
        memory_gib=80,
        peer_gb_per_s=64,
        network_gb_per_s=25,
        gpus_per_node=4,
        source="NVIDIA H100 data sheet, PCIe 5.0 x16",
    ),
    "h200": Gpu(
        device_name="H200",
        bf16_tflops=989,
        fp32_tflops=67,
        memory_gib=141,
        peer_gb_per_s=450,
        network_gb_per_s=400,
        source="NVIDIA H200 data sheet, SXM",
    ),
    "l40s": Gpu(
        device_name="L40S",
        bf16_tflops=362,
        fp32_tflops=91.6,
        memory_gib=48,
        peer_gb_per_s=32,
        network_gb_per_s=25,
        gpus_per_node=4,
        source="NVIDIA L40S data sheet; PCIe 4.0 x16",
    ),
    "rtx-a6000": Gpu(
        device_name="RTX A6000",
        bf16_tflops=154.8,
        fp32_tflops=38.7,
        memory_gib=48,
        peer_gb_per_s=32,
        network_gb_per_s=25,
        gpus_per_node=4,
        source="NVIDIA RTX A6000 data sheet; PCIe 4.0 x16",
    ),
}


def find_gpu(name: str) -> Gpu:
    """A GPU by its short name.

    Raises:
        ConfigError: no such GPU; the known ones are listed.
    """
    if name not in GPUS:
        raise ConfigError(f"--gpu {name}: not known; known are {', '.join(GPUS)}")
    return GPUS[name]
