"""The configs of pretraining and fine-tuning, and the rules between their fields. No torch here."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mimscale.config import build_config, require_positive
from mimscale.errors import ConfigError
from mimscale.models.config import MaeConfig, MaskConfig, UnetrConfig, VitConfig
from mimscale.stream.config import AugmentConfig, StreamConfig
from mimscale.train.run_dir import RunDir


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How DeepSpeed shards, computes and communicates."""

    zero_stage: Literal[0, 1, 2, 3] = 1  # what is sharded: 0 nothing, 1 optimizer, 2 + gradients, 3 + weights
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on CUDA at stages 1-3, else fp32
    clip_grad_norm: float = 1.0  # global norm above which gradients are scaled down; 0 turns it off
    bucket_elements: int = 50_000_000  # elements in one communication; small enough that several overlap
    deterministic: bool = False  # CUDA: slower kernels that give bitwise equal results; the CPU always does
    collective_timeout_min: float = 30.0  # a collective that waits longer is an error
    extra: dict[str, Any] = field(default_factory=dict)  # further top-level DeepSpeed keys, passed through unchecked

    def __post_init__(self) -> None:
        if self.clip_grad_norm < 0:
            raise ValueError(f"engine.clip_grad_norm={self.clip_grad_norm}: must be 0 (off) or above")
        require_positive("engine", bucket_elements=self.bucket_elements)
        require_positive("engine", collective_timeout_min=self.collective_timeout_min)
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError(
                "engine.precision=bf16 with engine.zero_stage=0: DeepSpeed 0.19 takes other steps there than at stages "
                "1-3; use zero_stage 1 (it also saves memory) or fp32"
            )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay."""

    lr: float = 1.5e-4  # peak learning rate
    min_lr_ratio: float = 0.01  # final learning rate as a part of the peak
    warmup_steps: int = 0  # steps of the linear rise from 0
    weight_decay: float = 0.05  # matrices only: biases, norms, tokens and position tables are left alone
    betas: tuple[float, float] = (0.9, 0.95)
    layer_decay: float = 1.0  # fine-tuning: factor by which the rate falls from each encoder block to the one below
    head_lr_ratio: float = 1.0  # fine-tuning: learning rate of everything but the encoder, as a factor

    def __post_init__(self) -> None:
        require_positive("optim", lr=self.lr, layer_decay=self.layer_decay, head_lr_ratio=self.head_lr_ratio)
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"optim.min_lr_ratio={self.min_lr_ratio}: must be between 0 and 1")
        if self.warmup_steps < 0 or self.weight_decay < 0:
            raise ValueError("optim.warmup_steps and optim.weight_decay must not be negative")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, and what to keep."""

    every_steps: int = 1_000  # steps between two saves; a stop and the end save as well
    keep: int = 3  # newest checkpoints that stay
    mode: Literal["background", "sync"] = "background"  # training goes on while a copy is written, or waits for it
    on_failure: Literal["stop", "continue"] = "stop"  # after a save that failed; the last save of a job always stops it

    def __post_init__(self) -> None:
        require_positive("checkpoint", every_steps=self.every_steps, keep=self.keep)


@dataclass(frozen=True, kw_only=True)
class MeterConfig:
    """What a run writes about itself."""

    log_every_steps: int = 1  # steps between two lines of metrics.jsonl
    tensorboard: bool = True  # also write TensorBoard events
    record_samples: bool = False  # write every sample id a step and rank to samples/

    def __post_init__(self) -> None:
        require_positive("meter", log_every_steps=self.log_every_steps)


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Fixed crops and fixed masks of the validation volumes: the same numbers on every run and rank count."""

    every_steps: int = 500  # steps between two validations; 0 turns them off
    crops_per_volume: int = 2  # crops of each validation volume
    max_volumes: int = 64  # validation volumes, the first by volume id

    def __post_init__(self) -> None:
        if self.every_steps < 0:
            raise ValueError(f"validation.every_steps={self.every_steps}: must be 0 (off) or above")
        require_positive("validation", crops_per_volume=self.crops_per_volume, max_volumes=self.max_volumes)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What pretraining and fine-tuning share. A step is an optimizer step on `global_batch` crops."""

    store: Path  # folder that `mimscale ingest` made, or the URL of a copy of it (s3://bucket/store)
    run_dir: Path  # folder of this run; an existing run in it continues
    steps: int  # optimizer steps of the whole run
    global_batch: int  # crops a step, over all ranks and micro-batches
    micro_batch: int  # crops that one rank computes at once
    crop_voxels: tuple[int, int, int]  # [Z, Y, X]
    patch_voxels: tuple[int, int, int]  # [Z, Y, X]
    seed: int = 0  # of weights, order, crops and masks
    modality: str | None = None  # only volumes of this modality
    stop_after_min: float | None = None  # save and leave after this long (before a time limit), as if signalled
    model: VitConfig = field(default_factory=VitConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    meter: MeterConfig = field(default_factory=MeterConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch", "micro_batch", "crop_voxels", "patch_voxels"):
            value = getattr(self, name)
            if any(number < 1 for number in (value if isinstance(value, tuple) else (value,))):
                raise ValueError(f"{name}={value}: must be at least 1")
        if any(crop % patch for crop, patch in zip(self.crop_voxels, self.patch_voxels, strict=True)):
            raise ValueError(
                f"crop_voxels={self.crop_voxels} is no multiple of patch_voxels={self.patch_voxels}; change one of them"
            )
        if self.augment.rot90_prob and self.crop_voxels[1] != self.crop_voxels[2]:
            raise ValueError(
                f"augment.rot90_prob={self.augment.rot90_prob}: a quarter turn needs equal crop edges along Y and X, "
                f"crop_voxels={self.crop_voxels}; change one of them"
            )
        if self.global_batch % self.micro_batch:
            raise ValueError(f"global_batch={self.global_batch} is no multiple of micro_batch={self.micro_batch}")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """`mimscale pretrain`."""

    mask: MaskConfig = field(default_factory=MaskConfig)
    mae: MaeConfig = field(default_factory=MaeConfig)

    kind: Literal["pretrain"] = "pretrain"


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    """`mimscale finetune`."""

    overlay: str = "label"  # the store's overlay that holds the class of each voxel
    init_from: Path | None = None  # a pretraining run, or a folder that `mimscale export` made; null: from scratch
    unetr: UnetrConfig

    kind: Literal["finetune"] = "finetune"


# Keys that may differ when a run continues: they change neither the model nor the order of the data. Keys with a dot at
# the end stand for everything below them. The store may move: the plan hash guards what is in it.
FREE_KEYS = frozenset(
    {
        "store",
        "run_dir",
        "steps",
        "micro_batch",
        "stop_after_min",
        "engine.zero_stage",
        "engine.collective_timeout_min",
        "stream.workers",
        "stream.prefetch_batches",
        "stream.timeout_s",
        "stream.max_spacing_ratio",
        "stream.max_bad_samples",
        "stream.stage_dir",
        "stream.stage_gib",
        "checkpoint.",
        "meter.",
        "validation.",
    }
)

# Keys that --fresh-data lets differ too: they change the order of the data, and not the model.
DATA_KEYS = frozenset({"seed", "modality", "global_batch", "stream."})


def accumulation(config: RunConfig, world_size: int) -> int:
    """Micro-batches that each rank computes a step.

    Raises:
        ConfigError: the global batch does not divide among the ranks; the legal rank counts are listed.
    """
    if config.global_batch % (config.micro_batch * world_size):
        micro_batches = config.global_batch // config.micro_batch
        legal = [size for size in range(1, micro_batches + 1) if micro_batches % size == 0]
        raise ConfigError(
            f"global_batch={config.global_batch} with micro_batch={config.micro_batch} does not divide among "
            f"{world_size} ranks; legal rank counts are {', '.join(map(str, legal))}"
        )
    return config.global_batch // (config.micro_batch * world_size)


def load_run_config(run_dir: Path) -> PretrainConfig | FinetuneConfig:
    """The config of an existing run.

    Raises:
        ConfigError: no run directory, or a config of another version.
    """
    run = RunDir(run_dir)
    tree = run.read_config_tree()
    kinds: dict[str, type[PretrainConfig] | type[FinetuneConfig]] = {
        "pretrain": PretrainConfig,
        "finetune": FinetuneConfig,
    }
    kind = tree.get("kind")
    if kind not in kinds:
        raise ConfigError(f"{run.config}: kind={kind!r}, expected one of {', '.join(kinds)}")
    return build_config(kinds[kind], tree, str(run.config))
