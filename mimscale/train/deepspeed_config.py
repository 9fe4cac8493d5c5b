"""Our engine config -> DeepSpeed's. A pure function: every value is written, since 0.19.8 changed defaults.

DeepSpeed accepts unknown top-level keys in silence, so nobody writes this tree by hand.
"""

from typing import Any, Literal

from mimscale.errors import ConfigError
from mimscale.train.config import EngineConfig

PERSISTENT_BELOW_ELEMENTS = 100_000  # stage 3 leaves smaller weights whole on every rank
LIVE_PARAMETERS = 1_000_000_000  # that stage 3 holds gathered at once
ALONE_BUCKET_ELEMENTS = 65_536  # every matrix has more


def copies_no_gradients(zero_stage: int, world_size: int, *, bf16: bool) -> bool:
    """Whether gradients stay where the backward pass puts them: on one rank in fp32 nothing has to be summed.

    DeepSpeed else copies each gradient into a bucket, sums it with nobody, and copies it out again: three passes over
    memory, and fresh memory for two of them.
    """
    return zero_stage == 1 and world_size == 1 and not bf16


def sums_micro_batches_in_bf16(zero_stage: int, accumulation: int, *, bf16: bool) -> bool:
    """Whether the gradients of a step's micro-batches are added up in bf16, which loses digits.

    DeepSpeed's stage 1 adds them up where autograd puts them; asked for fp32 it takes an optimizer of another kind.
    """
    return bf16 and zero_stage == 1 and accumulation > 1


def deepspeed_config(
    config: EngineConfig,
    *,
    precision: Literal["fp32", "bf16"],
    micro_batch: int,
    accumulation: int,
    world_size: int,
) -> dict[str, Any]:
    """DeepSpeed's config tree for one run.

    Raises:
        ConfigError: `engine.extra` sets a key that mimscale sets itself.
    """
    alone = copies_no_gradients(config.zero_stage, world_size, bf16=precision == "bf16")
    overlaps = config.zero_stage >= 2 or (config.zero_stage == 1 and accumulation == 1 and not alone)
    sums = "fp32" if accumulation > 1 and config.zero_stage > 1 else precision
    tree: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch * accumulation * world_size,
        "gradient_clipping": config.clip_grad_norm if config.zero_stage else 0.0,  # stage 0: the engine clips
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        # Sums of bf16 gradients over many ranks lose digits (DeepSpeed issue 5898).
        "communication_data_type": "fp32",
        # The check makes the host wait for the device in every step; the engine leaves out what is not finite itself.
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": False},
        "fp16": {"enabled": False},
        "data_types": {"grad_accum_dtype": sums},
        "zero_optimization": {
            "stage": config.zero_stage,
            # Stage 1 of DeepSpeed 0.19.8 reduces wrong gradients when it overlaps several buckets over more than one
            # micro-batch; stages 2 and 3, and stage 1 with one micro-batch, do not (tests compare all of them).
            "overlap_comm": overlaps,
            "contiguous_gradients": not alone,
            "reduce_scatter": True,
            # A gradient that is larger than a bucket is reduced where it lies.
            "reduce_bucket_size": ALONE_BUCKET_ELEMENTS if alone else config.bucket_elements,
            "allgather_partitions": True,
            "allgather_bucket_size": config.bucket_elements,
            "round_robin_gradients": False,
            "stage3_prefetch_bucket_size": config.bucket_elements,
            "stage3_param_persistence_threshold": PERSISTENT_BELOW_ELEMENTS,
            "stage3_max_live_parameters": LIVE_PARAMETERS,
            "stage3_max_reuse_distance": 1_000_000_000,
            "stage3_gather_16bit_weights_on_model_save": False,
            "sub_group_size": 1_000_000_000,
        },
        # Our optimizer is torch's AdamW; DeepSpeed would rather build its own.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "steps_per_print": 1_000_000_000,
        "dump_state": False,
    }
    taken = sorted(tree.keys() & config.extra.keys())
    if taken:
        raise ConfigError(f"engine.extra: {', '.join(taken)} already set by mimscale; use the engine.* fields")
    return tree | config.extra
