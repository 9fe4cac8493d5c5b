"""One job of a run, from the empty process to outcome.json: what pretraining and fine-tuning share."""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mimscale import durable
from mimscale.config import config_tree, config_yaml
from mimscale.console import say
from mimscale.errors import INTERRUPTED_EXIT_CODE, ConfigError, DataError, LostRankError, MimscaleError
from mimscale.models.contract import CONTRACT_FILE, WEIGHTS_FILE
from mimscale.models.transfer import save_weights
from mimscale.store.layout import StoreInfo, overlay_path, pack_path, read_info, stored_overlay
from mimscale.store.manifest import TRAINING_COLUMNS, Manifest, load_manifest
from mimscale.store.stage import STAGE_COLUMNS, Stage, packs_of
from mimscale.stream.batch import Batch
from mimscale.stream.device import OnDevice
from mimscale.stream.loader import StreamLoader, fixed_batches
from mimscale.stream.plan import FixedPlan, Position, SamplePlan
from mimscale.stream.select import parse_attribute, parse_filter, refuse_mixed_spacings
from mimscale.stream.staging import Copier, upcoming_packs
from mimscale.stream.subjects import first_subjects, in_split
from mimscale.train.build import weights_contract
from mimscale.train.checkpoint import Checkpoints, Saved
from mimscale.train.config import DATA_KEYS, FREE_KEYS, RunConfig, accumulation
from mimscale.train.engine import Engine, join_ranks, leave_ranks
from mimscale.train.environment import job_record
from mimscale.train.garbage import collected_between_steps
from mimscale.train.health import Health
from mimscale.train.loop import train
from mimscale.train.meter import Meter
from mimscale.train.preflight import preflight
from mimscale.train.ranks import Ranks
from mimscale.train.run_dir import Outcome, RunDir
from mimscale.train.startup import Startup
from mimscale.train.volume_facts import VolumeFacts
from mimscale.train.watchdog import Watchdog
from mimscale.world import StopRequest, World

# When a batch script wants the run to save and leave, in seconds since 1970.
STOP_AT_VARIABLE = "MIMSCALE_STOP_AT_UNIX_S"
# What torch says when the process at the other end of a collective is gone.
LOST_PEER_TEXTS = ("Connection closed", "Connection reset", "remote process", "Broken pipe", "Timed out")


class Objective(Protocol):
    """What distinguishes pretraining from fine-tuning."""

    overlay: str | None  # of the store, when the loss needs labels

    def build(self, channels: int) -> nn.Module:
        """The model, its weights drawn from torch's generator, which is seeded the same on every rank."""

    def prepare(self, model: nn.Module, data: "TrainingData", ranks: Ranks) -> None:
        """Bring a model to its state at step 0 (transfer, class prior), the same on every rank. A collective.

        Not called when a run continues.
        """

    def loss(self, forward: Callable[..., Any], batch: Batch) -> Tensor:
        """[] the mean loss of a micro-batch on the device."""

    def take_yardsticks(self) -> dict[str, Tensor | float]:
        """Trivial losses of the micro-batches since the last call, each [] and comparable with theirs; by name."""

    def validation_sums(self, forward: Callable[..., Any], batch: Batch) -> dict[str, Tensor | float]:
        """Sums (numbers or arrays) over a batch that add up over batches and ranks; `samples` among them."""

    def validation_metrics(self, sums: dict[str, Any]) -> dict[str, float]:
        """The sums over all validation crops -> metrics."""


class TrainingData:
    """The store as one run sees it: its train and validation volumes and the order of the samples.

    Raises:
        DataError: no store, or no volume that the config selects.
        ConfigError: labels on the grid of the sources.
    """

    def __init__(self, config: RunConfig, overlay: str | None) -> None:
        self.config = config
        self.overlay = overlay
        self.info: StoreInfo = read_info(config.store)
        if overlay is not None and overlay not in self.info.overlays:
            known = ", ".join(self.info.overlays) or "none, so ingest the volumes with their labels"
            raise DataError(f"{config.store}: no overlay {overlay!r}; there are: {known}")
        if overlay is not None and overlay != stored_overlay(overlay):
            raise ConfigError(
                f"overlay={overlay}: lies on the grid of the sources, for scores; train with "
                f"overlay={stored_overlay(overlay)}"
            )
        stream = config.stream
        filtered = None if stream.filter is None else parse_filter(stream.filter)
        by = None if stream.weights is None else parse_attribute(stream.weights.by, "stream.weights.by")
        columns = {"spacing_mm"}.union(*(part.columns for part in (filtered, by) if part is not None))
        if stream.fold is not None or stream.train_fraction < 1:
            columns = columns | {"subject"}
        self.manifest: Manifest = load_manifest(config.store, sorted(columns.union(TRAINING_COLUMNS)))
        self._kept = np.ones(len(self.manifest), bool) if filtered is None else filtered.select(self.manifest)
        self.train: NDArray[np.int64] = first_subjects(self.manifest, self._selected("train"), stream.train_fraction)
        self.validation = self._selected("val")[: config.validation.max_volumes]
        if not len(self.train):
            raise DataError(
                f"{config.store}: no training volume with modality={config.modality}, overlay={overlay}, "
                f"stream.filter={stream.filter}; see `mimscale inspect {config.store}`"
            )
        if config.checkpoint.keep_best is not None and not len(self.validation):
            raise DataError(
                f"{config.store}: no validation volume, so checkpoint.keep_best={config.checkpoint.keep_best} would "
                "keep nothing; set it to null, or ingest with a validation split"
            )
        refuse_mixed_spacings(self.manifest, self.train, stream)
        self.channels = self.manifest.sample_row(int(self.train[0])).shape[0]
        self.plan = SamplePlan.of(
            self.manifest,
            self.train,
            seed=config.seed,
            crop_voxels=config.crop_voxels,
            config=config.stream,
            global_batch=config.global_batch,
            store=config.store,
            overlay=overlay,
        )

    def _selected(self, split: str) -> NDArray[np.int64]:
        """Volumes of a split that the config asks for, and that have the overlay, when there is one."""
        wanted = {} if self.config.modality is None else {"modality": self.config.modality}
        in_its_split = in_split(self.manifest, split, self.config.stream)
        indices: NDArray[np.int64] = np.flatnonzero(self._kept & in_its_split & self.manifest.equal(**wanted))
        if self.overlay is None:
            return indices
        labelled: NDArray[np.int64] = indices[self.manifest.overlay_parts(self.overlay)[indices] >= 0]
        return labelled

    @cached_property
    def stage(self) -> Stage | None:
        """Where copies of packs may lie on this node, when the config has a place for them.

        Raises:
            DataError: the folder cannot be made or written.
        """
        stream = self.config.stream
        if stream.stage_dir is None:
            return None
        packs = packs_of(self.config.store, load_manifest(self.config.store, STAGE_COLUMNS), self.overlay)
        return Stage(stream.stage_dir, int(stream.stage_gib * 2**30), packs)

    def _paths_of(self, volume: int) -> list[Path]:
        """The packs that a training volume lies in."""
        row = self.manifest.sample_row(int(self.train[volume]))
        paths = [pack_path(self.config.store, row.part)]
        if self.overlay is not None:
            paths.append(overlay_path(self.config.store, self.overlay, row.overlays[self.overlay].part))
        return paths

    def loader(self, world: World, start_batch: int) -> StreamLoader:
        """Micro-batches of this rank from global batch `start_batch` on; on local rank 0 also the node's copier."""
        copier = None
        if self.stage is not None and world.local_rank == 0:
            micro_batches = accumulation(self.config, world.size)
            upcoming = upcoming_packs(self.plan, world, micro_batches, self._paths_of)
            copier = Copier(self.stage, upcoming, self.plan.batches_per_epoch, start_batch)
            copier.start()
        return StreamLoader(
            store=self.config.store,
            manifest=self.manifest,
            indices=self.train,
            plan=self.plan,
            config=self.config.stream,
            world=world,
            micro_batch=self.config.micro_batch,
            accumulation=accumulation(self.config, world.size),
            overlay=self.overlay,
            start_batch=start_batch,
            stage=self.stage,
            copier=copier,
        )

    def contract(self, step: int, precision: str) -> dict[str, Any]:
        """What travels with the weights of `step`."""
        return weights_contract(
            self.config,
            self.info,
            channels=self.channels,
            step=step,
            precision=precision,
            overlay=self.overlay,
            datasets=self.manifest.datasets(self.train),
            spacing_mm=np.median(self.manifest.column("spacing_mm")[self.train], axis=0).round(4).tolist(),
        )

    def validation_batches(self, world: World) -> Iterator[Batch]:
        """Crops that never change, dealt out to the ranks; every rank gets the same number of batches."""
        config = self.config
        plan = FixedPlan.of(
            self.manifest,
            self.validation,
            seed=config.seed,
            crop_voxels=config.crop_voxels,
            config=replace(config.stream, crops_per_volume=config.validation.crops_per_volume),
            store=config.store,
            overlay=self.overlay,
        )
        facts = VolumeFacts(self.manifest, self.validation, self.info.intensity)
        batches = fixed_batches(
            store=config.store,
            manifest=self.manifest,
            indices=self.validation,
            plan=plan,
            world=world,
            batch=config.micro_batch,
            config=config.stream,
            overlay=self.overlay,
            stage=self.stage,
        )
        return facts.added(batches)


def run_session(
    config: RunConfig, objective: Objective, *, fresh: bool, fresh_data: bool = False
) -> tuple[Outcome, dict[str, Any]]:
    """Run or continue a training run, together with the other ranks; returns how it ended and the last metrics.

    Args:
        config: of the run.
        objective: pretraining or fine-tuning.
        fresh: move an existing run aside and start over.
        fresh_data: go on although the data or their order are not those that the run began with.

    Raises:
        MimscaleError: what went wrong, after it was written to outcome.json.
    """
    world = World.from_environment(os.environ)
    accumulation(config, world.size)
    run = RunDir(config.run_dir)
    stop = StopRequest()
    if config.stop_after_min is not None:
        stop.stop_after("stop_after_min", 60 * config.stop_after_min)
    if STOP_AT_VARIABLE in os.environ:
        stop.stop_after("time limit", float(os.environ[STOP_AT_VARIABLE]) - time.time())
    startup = Startup(os.environ)
    claimed = False
    try:
        with ExitStack() as stack:
            ranks = join_ranks(world, collective_timeout_min=config.engine.collective_timeout_min)
            stack.callback(leave_ranks)
            startup.ends("init_s")
            preflight(config, ranks)
            startup.ends("preflight_s")
            if world.is_first:
                # Opened here and not inside `first_does`, so that the lock is held as long as the job lasts.
                stack.enter_context(
                    _Claim(ranks, run, config, fresh, FREE_KEYS | DATA_KEYS if fresh_data else FREE_KEYS)
                )
            else:
                ranks.first_does(lambda: None)
            claimed = True
            stack.enter_context(run.registered(world.rank))
            watchdog = stack.enter_context(Watchdog(run, config.health, world))
            outcome, metrics = _train(config, objective, run, ranks, stop, startup, stack, watchdog, fresh_data)
    except Exception as error:
        failure = _as_failure(error, world, config)
        # Before the claim the directory may be another job's. After it, the first rank to fail says why.
        if claimed and not run.outcome.exists():
            with suppress(OSError):  # on a full disk the message on stderr has to do
                run.write_outcome(Outcome(outcome="failed", exit_code=failure.exit_code, step=-1, message=str(failure)))
        if failure is error:
            raise
        traceback.print_exc()
        raise failure from error
    finally:
        stop.hand_back()
    return outcome, metrics


class _Claim:
    """Rank 0's hold on the run directory. The other ranks learn whether it worked."""

    def __init__(self, ranks: Ranks, run: RunDir, config: RunConfig, fresh: bool, free_keys: frozenset[str]) -> None:
        self._ranks, self._run, self._config, self._fresh, self._free_keys = ranks, run, config, fresh, free_keys
        self._stack = ExitStack()

    def __enter__(self) -> "_Claim":
        try:
            self._ranks.first_does(self._take)
        except BaseException:
            self._stack.close()
            raise
        return self

    def _take(self) -> None:
        run, config = self._run, self._config
        if self._fresh:
            run.move_aside()
        with durable.explained(DataError, run.path, "choose another run_dir or free space"):
            self._stack.enter_context(self._lock())
            run.open(config_tree(config), config_yaml(config), free_keys=self._free_keys)
            durable.write_json(run.environment, job_record(os.environ))
            run.outcome.unlink(missing_ok=True)

    def _lock(self) -> AbstractContextManager[None]:
        return self._run.locked(os.environ.get("MIMSCALE_JOB_ID", "none"), os.environ.get("MIMSCALE_LOCK_OWNER"))

    def __exit__(self, *details: object) -> None:
        self._stack.close()


def _train(
    config: RunConfig,
    objective: Objective,
    run: RunDir,
    ranks: Ranks,
    stop: StopRequest,
    startup: Startup,
    stack: ExitStack,
    watchdog: Watchdog,
    fresh_data: bool,
) -> tuple[Outcome, dict[str, Any]]:
    world = ranks.world
    data = TrainingData(config, objective.overlay)
    torch.manual_seed(config.seed)
    model = objective.build(data.channels)
    if not any(run.checkpoints.glob("step_*")):
        objective.prepare(model, data, ranks)
    engine = Engine(model, config, ranks)
    startup.ends("build_s")

    def write_weights(folder: Path, step: int, weights: dict[str, Tensor]) -> list[Path]:
        save_weights(folder, weights, data.contract(step, engine.precision))
        return [folder / WEIGHTS_FILE, folder / CONTRACT_FILE]

    checkpoints = Checkpoints(run, config.checkpoint, engine, ranks, write_weights)
    restored = checkpoints.restore()
    first_step = 0
    if restored.position is not None:
        first_step = _first_step(data.plan, Position.from_dict(restored.position), restored.step, fresh_data)
        if ranks.is_first:
            say(f"{run.path}: continues at step {first_step} of {config.steps}")
    startup.ends("load_s")
    meter = stack.enter_context(Meter(run, config.meter, world, steps=config.steps, global_batch=config.global_batch))
    meter.start(first_step)

    def roll_back() -> int | None:
        report(checkpoints.commit())  # what is being written would be cleared away as a dead run's
        has_saved = ranks.first_does(lambda: any(run.checkpoints.glob("step_*")))
        return checkpoints.restore().step if has_saved else None

    health = Health(config.health, run, ranks, tree=config_tree(config), rollback=roll_back)
    health.start(first_step)
    loader = data.loader(world, first_step)
    stack.callback(loader.close)

    def report(saved: Saved | None) -> None:
        if saved is not None:
            values = {"stall_s": saved.stall_s, "write_s": saved.write_s, "bytes": saved.total_bytes}
            meter.log_checkpoint(saved.step, {f"checkpoint_{name}": value for name, value in values.items()})

    def stop_wanted() -> bool:
        if ranks.is_first:
            startup.first_step_is_done(run)
        return stop.reason != ""

    def validate() -> dict[str, float]:
        sums: dict[str, Tensor | float] = {}
        with engine.evaluating():
            for batch in OnDevice(data.validation_batches(world), ranks.device):
                watchdog.alive()
                for name, value in objective.validation_sums(engine, batch).items():
                    sums[name] = sums.get(name, 0.0) + value
        return objective.validation_metrics(ranks.total(sums))

    def save(step: int) -> None:
        watchdog.alive()
        report(checkpoints.save(step, data.plan.position(step).to_dict()))
        watchdog.alive()

    def validation_due(step: int) -> bool:
        every = config.validation.every_steps
        return every > 0 and len(data.validation) > 0 and (step % every == 0 or step == config.steps)

    collect = stack.enter_context(collected_between_steps())

    def step_done(step: int) -> None:
        watchdog.alive(step)
        collect(step)

    done = train(
        first_step=first_step,
        steps=config.steps,
        accumulation=accumulation(config, world.size),
        engine=engine,
        ranks=ranks,
        batches=startup.watched(OnDevice(loader, ranks.device)),
        loss_of=lambda batch: objective.loss(engine, batch),
        meter=meter,
        health=health,
        stop_wanted=stop_wanted,
        step_done=step_done,
        save=save,
        save_due=checkpoints.due,
        validate=validate,
        validation_due=validation_due,
        take_counts=loader.take_counts,
        take_yardsticks=objective.take_yardsticks,
        is_written=checkpoints.is_written,
        commit=lambda: report(checkpoints.commit()),
    )
    report(checkpoints.finish())
    finished = done >= config.steps
    outcome = Outcome(
        outcome="finished" if finished else "interrupted",
        exit_code=0 if finished else INTERRUPTED_EXIT_CODE,
        step=done,
        message="" if finished else "stopped by request; the same command continues",
        stopped_by="" if finished else stop.reason or "another rank",
    )
    if ranks.is_first:
        run.write_outcome(outcome)
        say(f"{run.path}: {outcome.outcome} at step {done} of {config.steps}")
    return outcome, {"step": done, "outcome": outcome.outcome, **meter.last_metrics}


def _first_step(plan: SamplePlan, position: Position, step: int, fresh_data: bool) -> int:
    """The step to go on at. In another order that was accepted it is the same one: no count of batches must be kept."""
    if fresh_data and position.plan_hash != plan.plan_hash:
        return step
    done = plan.batches_done(position)
    assert done == step, f"step {step} stands at the data of step {done}"
    return done


def _as_failure(error: Exception, world: World, config: RunConfig) -> MimscaleError:
    """The error that a user sees: ours as they are, a lost peer by its name, anything else as a bug."""
    if isinstance(error, MimscaleError):
        return error
    if isinstance(error, RuntimeError) and any(text in str(error) for text in LOST_PEER_TEXTS):
        return LostRankError(
            f"rank {world.rank} on {world.node}: another rank is gone or hangs ({str(error).splitlines()[0]}); "
            f"see the other ranks' logs, then give the same command again: it continues from the last checkpoint"
        )
    return MimscaleError(f"rank {world.rank} on {world.node}: {type(error).__name__}: {error}")


def session_main(
    config: RunConfig, objective: Objective, *, fresh: bool, fresh_data: bool = False, as_json: bool
) -> int:
    """Run a session as a verb's body; returns the exit code."""
    world = World.from_environment(os.environ)
    try:
        outcome, metrics = run_session(config, objective, fresh=fresh, fresh_data=fresh_data)
    except MimscaleError as error:
        if world.size == 1:
            raise
        # A rank that fails alone must not wait for its peers in a library's exit handler.
        sys.stderr.write(f"mimscale: {error}\n")
        sys.stderr.flush()
        os._exit(error.exit_code)
    if as_json and world.is_first:
        print(json.dumps(metrics, sort_keys=True), flush=True)
    return exit_code_of_rank(outcome, world, os.environ)


def exit_code_of_rank(outcome: Outcome, world: World, environment: Mapping[str, str]) -> int:
    """The exit code of this rank's process.

    srun ends the other ranks when one leaves with another code than 0, while they may still close their files. So
    ranks that srun has started leave an interrupted run with 0; outcome.json has the truth.
    """
    started_by_srun = "SLURM_STEP_ID" in environment and "TORCHELASTIC_RUN_ID" not in environment
    return 0 if started_by_srun and world.size > 1 and outcome.outcome == "interrupted" else outcome.exit_code
