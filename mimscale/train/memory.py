"""What a rank holds on its device while it trains, by ZeRO stage. Estimates for login nodes, without torch.

Follows what DeepSpeed 0.19.8 allocates, which is more than the 16 bytes a parameter of Rajbhandari et al. 2020
(arXiv:1910.02054, sec. 3.1): buckets, flattened copies, and weights that stage 3 has gathered.
"""

from dataclasses import dataclass

from mimscale.models.activations import Activations
from mimscale.train.config import FinetuneConfig, RunConfig
from mimscale.train.deepspeed_config import LIVE_PARAMETERS, PERSISTENT_BELOW_ELEMENTS, copies_no_gradients
from mimscale.train.size import BYTES_OF_ADAM, BYTES_OF_MASTER, parameter_sizes

_FP32 = 4
_ALL_REDUCE_ELEMENTS = 500_000_000  # stage 0 flattens gradients in pieces of this


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank. Not all of them are held at once, so the peak is below their sum."""

    weights: int  # its share of them, and the whole of them while stage 3 computes
    gradients: int  # when a step's backward passes are over
    optimizer: int  # two moments, and ZeRO's own fp32 weights
    activations: int  # of a micro-batch, with its voxels
    communication: int  # buckets, and gradients that wait for one
    peak: int  # the most that is held at one moment
    peak_in: str  # that moment: forward, backward or update

    @property
    def kept(self) -> int:
        """What is held whatever the micro-batch."""
        return self.weights + self.gradients + self.optimizer + self.communication


def estimate_memory(
    config: RunConfig, world_size: int, *, bf16: bool, accumulates: bool = False, channels: int = 1
) -> Memory:
    """About what a rank holds.

    Args:
        config: of the run.
        world_size: ranks that ZeRO shares among.
        bf16: whether weights and activations are bf16.
        accumulates: whether a step has more than one micro-batch.
        channels: of the store.
    """
    stage, width = config.engine.zero_stage, 2 if bf16 else _FP32
    sizes = parameter_sizes(config, channels)
    numbers, bucket = sum(sizes), config.engine.bucket_elements
    share = numbers if stage == 0 else -(-numbers // world_size)  # of what the stage shards
    activations = run_activations(config, width, channels)
    voxels_bytes = config.micro_batch * batch_bytes(config, channels)
    kept_activations = config.micro_batch * activations.kept + voxels_bytes
    forward_activations = kept_activations + config.micro_batch * activations.transient
    backward_activations = kept_activations + config.micro_batch * activations.recomputed

    summed = _FP32 if accumulates and stage > 1 else width  # a gradient that micro-batches are added up in
    weights, optimizer = width * numbers, (BYTES_OF_ADAM + (BYTES_OF_MASTER if stage else 0)) * share
    overlapped_buckets = 1 if stage == 1 and accumulates else 2
    buckets = overlapped_buckets * width * bucket
    waiting = min(2 * bucket, numbers) * width + (bucket * _FP32 if bf16 else 0)  # bf16 is summed in fp32
    if stage == 0:
        gradients, communication = width * numbers, width * min(numbers, _ALL_REDUCE_ELEMENTS)
        before = gradients if accumulates else 0  # the last backward pass
        resting, update = weights + optimizer, gradients + communication
        forward, backward = before, before
        reduced = gradients + communication
    elif stage < 3:
        if copies_no_gradients(stage, world_size, bf16=bf16):
            buckets = waiting = 0
        gradients, communication = summed * share, buckets + waiting
        before = 0
        if accumulates:
            before = width * numbers + buckets if stage == 1 else gradients
        resting = weights + optimizer
        forward, backward = before, before + (0 if stage == 1 and accumulates else buckets)
        reduced = gradients + communication + (gradients if stage == 2 and accumulates and summed == width else 0)
        # Flattened, then widened; what was summed in fp32 is both.
        update = 2 * gradients + (_FP32 * share if bf16 else 0) if summed == width else gradients
    else:
        persistent = sum(size for size in sizes if size < PERSISTENT_BELOW_ELEMENTS)
        gathered = min(numbers - persistent, LIVE_PARAMETERS) if world_size > 1 else 0
        gradients, communication = summed * share, buckets + waiting
        resting = width * (share + (persistent if world_size > 1 else 0)) + optimizer + gradients + width * bucket
        weights = width * (share + gathered + (persistent if world_size > 1 else 0))
        forward = backward = width * gathered
        backward += buckets
        reduced = communication
        update = _FP32 * share if bf16 else 0
    moments = {
        "forward": resting + forward + forward_activations,
        "backward": resting + max(backward + backward_activations, reduced + voxels_bytes),
        "update": resting + update + voxels_bytes,
    }
    moment = max(moments, key=lambda name: moments[name])
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=max(forward_activations, backward_activations),
        communication=communication,
        peak=moments[moment],
        peak_in=moment,
    )


def run_activations(config: RunConfig, width: int, channels: int = 1) -> Activations:
    """What one sample keeps for the backward pass."""
    return config.network.activations(config, width, channels)


def batch_bytes(config: RunConfig, channels: int = 1) -> int:
    """A crop on the device: as it came (int16), normalised (fp32), which of its voxels are valid, and its label."""
    voxels = config.crop_voxels[0] * config.crop_voxels[1] * config.crop_voxels[2]
    has_label = isinstance(config, FinetuneConfig) and config.network.segments
    return voxels * (channels * (2 + _FP32) + 1 + (1 + 8 if has_label else 0))
