"""The configs of pretraining and fine-tuning, and the rules between their fields. No torch here."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mimscale.config import build_config, require_positive
from mimscale.errors import ConfigError
from mimscale.models.config import (
    EncoderConfig,
    MaeConfig,
    MaskConfig,
    SimclrConfig,
    SimmimConfig,
    TargetConfig,
    UnetrConfig,
    VitConfig,
)
from mimscale.stream.config import AugmentConfig, StreamConfig
from mimscale.train.method import Head, Method, Network, find_head, find_method, with_keys_of
from mimscale.train.retention import higher_is_better
from mimscale.train.run_dir import RunDir

if TYPE_CHECKING:
    Encoder = EncoderConfig
else:
    Encoder = VitConfig  # what `model` is parsed as; `variant` puts the class of another encoder in its place


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How DeepSpeed shards, computes and communicates."""

    zero_stage: Literal[0, 1, 2, 3] = 1  # what is sharded: 0 nothing, 1 optimizer, 2 + gradients, 3 + weights
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on CUDA at stages 1-3, else fp32
    clip_grad_norm: float = 1.0  # global norm above which gradients are scaled down; 0 turns it off
    # torch.compile of each block; one that cannot be compiled runs as it is. null: on CUDA, where shapes stay the same
    compile_blocks: bool | None = None
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

    # full: all weights from step 0. low_peak: the same at a tenth of `lr`. sawtooth: the head alone for `head_steps`,
    # then all weights, each with its own rise and fall. frozen: the head alone, always. The last three: fine-tuning
    schedule: Literal["full", "low_peak", "sawtooth", "frozen"] = "full"

    lr: float = 1.5e-4  # peak learning rate
    min_lr_ratio: float = 0.01  # final learning rate as a part of the peak
    warmup_steps: int = 0  # steps of the linear rise from 0
    head_steps: int = 0  # schedule=sawtooth: steps of the head alone
    weight_decay: float = 0.05  # matrices only: biases, norms, tokens and position tables are left alone
    betas: tuple[float, float] = (0.9, 0.95)
    layer_decay: float = 1.0  # fine-tuning: factor by which the rate falls from each encoder block to the one below
    head_lr_ratio: float = 1.0  # fine-tuning: learning rate of everything but the encoder, as a factor

    def __post_init__(self) -> None:
        require_positive("optim", lr=self.lr, layer_decay=self.layer_decay, head_lr_ratio=self.head_lr_ratio)
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"optim.min_lr_ratio={self.min_lr_ratio}: must be between 0 and 1")
        if (self.schedule == "sawtooth") != (self.head_steps > 0):
            raise ValueError(
                f"optim.schedule={self.schedule} with optim.head_steps={self.head_steps}: sawtooth needs steps of the "
                "head alone, and no other schedule has them"
            )
        if self.warmup_steps < 0 or self.weight_decay < 0:
            raise ValueError("optim.warmup_steps and optim.weight_decay must not be negative")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, and what to keep."""

    every_steps: int = 1_000  # steps between two saves; a stop and the end save as well
    keep: int = 3  # newest checkpoints that stay
    keep_every_steps: int | None = None  # checkpoints of multiples of this step stay for good as well; null: none
    keep_best: str | None = (
        None  # validation metric (val_loss, val_dice) whose best checkpoint stays as well; null: none
    )
    mode: Literal["background", "sync"] = "background"  # training goes on while a copy is written, or waits for it
    on_failure: Literal["stop", "continue"] = "stop"  # after a save that failed; the last save of a job always stops it

    def __post_init__(self) -> None:
        require_positive("checkpoint", every_steps=self.every_steps, keep=self.keep)
        if self.keep_every_steps is not None:
            require_positive("checkpoint", keep_every_steps=self.keep_every_steps)
            if self.keep_every_steps % self.every_steps:
                raise ValueError(
                    f"checkpoint.keep_every_steps={self.keep_every_steps}: must be a multiple of "
                    f"checkpoint.every_steps={self.every_steps}, or these steps have no checkpoint"
                )
        if self.keep_best is not None:
            higher_is_better(self.keep_best)  # refuses a metric whose direction nobody knows


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Weights & Biases. All jobs of a run directory are one W&B run."""

    project: str  # where the run appears
    entity: str | None = None  # team or user; null: the default of who is logged in
    name: str | None = None  # of the run; null: the name of run_dir
    mode: Literal["offline", "online"] = "offline"  # offline: sent later by `wandb sync`; compute nodes see no internet


@dataclass(frozen=True, kw_only=True)
class MeterConfig:
    """What a run writes about itself."""

    log_every_steps: int = 1  # steps between two lines of metrics.jsonl
    tensorboard: bool = True  # also write TensorBoard events
    wandb: WandbConfig | None = None  # also draw the run in Weights & Biases (extra `wandb`)
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
class HealthConfig:
    """What counts as ill, and what happens then."""

    max_skipped: int = 10  # steps of a run whose update is left out because it is not finite; one more ends the run
    on_spike: Literal["report", "rollback"] = "report"  # rollback: weights of the last checkpoint, data go on
    spike_window: int = 128  # losses that the next one is compared with
    spike_deviations: float = 8.0  # robust standard deviations above their median that a loss may lie
    spike_steps: int = 3  # losses in a row above that make a spike
    max_rollbacks: int = 3  # spikes of a run that are rolled back; one more ends the run
    # Without a step for longer, or with a checkpoint that is not written by then, the job ends with all stacks in logs/
    # and exit code 6.
    hang_timeout_s: float = 1200.0
    first_step_timeout_s: float = 3600.0  # the same for the time from the start of the process to its first step
    compare_ranks_every_steps: int = 50  # steps between two comparisons of the ranks' times
    slow_rank_factor: float = 1.5  # times the median of all ranks that a rank's own time may be

    def __post_init__(self) -> None:
        for name in ("max_skipped", "max_rollbacks"):
            if getattr(self, name) < 0:
                raise ValueError(f"health.{name}={getattr(self, name)}: must be 0 (none) or above")
        require_positive(
            "health",
            spike_deviations=self.spike_deviations,
            spike_steps=self.spike_steps,
            hang_timeout_s=self.hang_timeout_s,
            first_step_timeout_s=self.first_step_timeout_s,
            compare_ranks_every_steps=self.compare_ranks_every_steps,
        )
        if self.spike_window < 4:
            raise ValueError(f"health.spike_window={self.spike_window}: a median of fewer than 4 losses says nothing")
        if self.slow_rank_factor <= 1:
            raise ValueError(f"health.slow_rank_factor={self.slow_rank_factor}: must be above 1")


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
    model: Encoder = field(default_factory=VitConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    meter: MeterConfig = field(default_factory=MeterConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    health: HealthConfig = field(default_factory=HealthConfig)

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
        every_steps = self.validation.every_steps
        if self.checkpoint.keep_best is not None and (every_steps == 0 or self.checkpoint.every_steps % every_steps):
            raise ValueError(
                f"checkpoint.keep_best={self.checkpoint.keep_best}: needs a validation at every checkpoint; let "
                f"checkpoint.every_steps={self.checkpoint.every_steps} be a multiple of "
                f"validation.every_steps={every_steps}"
            )

    @property
    def network(self) -> Network[Any]:
        """What the run trains."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """`mimscale pretrain`."""

    method: str = "mae"  # mae, simmim, simclr ... or module:OBJECT; the block of its name holds its settings
    mask: MaskConfig = field(default_factory=MaskConfig)  # of methods that hide voxels
    mae: MaeConfig = field(default_factory=MaeConfig)
    simmim: SimmimConfig = field(default_factory=SimmimConfig)
    simclr: SimclrConfig = field(default_factory=SimclrConfig)
    exclude_overlay: str | None = None  # its voxels above 0 are no target; volumes without it are left out

    kind: Literal["pretrain"] = "pretrain"

    @classmethod
    def variant(cls, tree: dict[str, Any]) -> "type[PretrainConfig]":
        """The class with the keys that the tree's method has.

        Raises:
            ConfigError: there is no such method.
        """
        return with_keys_of(cls, find_method(str(tree.get("method", "mae"))))

    @property
    def network(self) -> Method:
        """The method."""
        return find_method(self.method)

    @property
    def target(self) -> TargetConfig | None:
        """What voxels are predicted; None where the method predicts none."""
        settings = getattr(self, self.network.name, None)
        return settings if isinstance(settings, TargetConfig) else None


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    """`mimscale finetune`."""

    overlay: str = "label"  # the store's overlay that holds the class of each voxel
    # Outputs that may overlap, each a name and the classes of the overlay that belong to it; sigmoid. null: the classes
    # themselves, which exclude each other; softmax
    regions: dict[str, list[str]] | None = None
    init_from: Path | None = None  # a pretraining run, or a folder that `mimscale export` made; null: from scratch
    # random: a control arm. Of `init_from` only the embedding stays, all blocks start as from scratch
    init_blocks: Literal["pretrained", "random"] = "pretrained"
    head: str = "unetr"  # unetr, linear (a probe) ... or module:OBJECT
    unetr: UnetrConfig

    kind: Literal["finetune"] = "finetune"

    @classmethod
    def variant(cls, tree: dict[str, Any]) -> "type[FinetuneConfig]":
        """The class with the keys that the tree's head has.

        Raises:
            ConfigError: there is no such head.
        """
        return with_keys_of(cls, find_head(str(tree.get("head", "unetr"))))

    @property
    def network(self) -> Head:
        """The head, with its encoder."""
        return find_head(self.head)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_blocks == "random" and self.init_from is None:
            raise ValueError("init_blocks=random: is a control for init_from, which is not set")
        if self.optim.schedule == "frozen" and self.model.drop_path > 0:
            raise ValueError(
                f"model.drop_path={self.model.drop_path}: would leave out blocks of an encoder that "
                "optim.schedule=frozen does not train; set it to 0"
            )
        if self.regions is not None:
            if not all(self.regions.values()):
                raise ValueError(f"regions={self.regions}: each needs at least one class")
            if len(self.regions) != self.unetr.num_classes:
                raise ValueError(
                    f"unetr.num_classes={self.unetr.num_classes}, but there are {len(self.regions)} regions "
                    f"({', '.join(self.regions)}); make them equal"
                )


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
        "engine.compile_blocks",
        "engine.collective_timeout_min",
        "stream.workers",
        "stream.prefetch_batches",
        "stream.timeout_s",
        "stream.max_spacing_ratio",
        "stream.max_bad_samples",
        "stream.stage_dir",
        "stream.stage_gib",
        "targets.table",
        "targets.journal",
        "targets.unmatched",
        "checkpoint.",
        "meter.",
        "validation.",
        "health.",
    }
)

# Keys that --fresh-data lets differ too: they change the order of the data, and not the model.
DATA_KEYS = frozenset({"seed", "modality", "global_batch", "stream.", "targets.table_hash"})


def accumulation(config: RunConfig, world_size: int) -> int:
    """Micro-batches that each rank computes a step.

    Raises:
        ConfigError: the global batch does not divide among the ranks; the legal rank counts are listed. Or the crops
            that are computed at once are not those that the method needs at once.
    """
    if config.global_batch % (config.micro_batch * world_size):
        micro_batches = config.global_batch // config.micro_batch
        legal = [size for size in range(1, micro_batches + 1) if micro_batches % size == 0]
        raise ConfigError(
            f"global_batch={config.global_batch} with micro_batch={config.micro_batch} does not divide among "
            f"{world_size} ranks; legal rank counts are {', '.join(map(str, legal))}"
        )
    if isinstance(config, PretrainConfig):
        problem = config.network.problem_of_ranks(config, world_size)
        if problem is not None:
            raise ConfigError(problem)
    return config.global_batch // (config.micro_batch * world_size)


def legal_nodes(config: RunConfig, processes: int) -> list[int]:
    """Numbers of nodes among which the global batch divides, with this many processes on each."""
    micro_batches = config.global_batch // config.micro_batch
    return [nodes for nodes in range(1, micro_batches // processes + 1) if micro_batches % (nodes * processes) == 0]


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
