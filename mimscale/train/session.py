"""One job of a run, from the empty process to outcome.json: what pretraining and fine-tuning share."""

import json
import os
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimscale import durable
from mimscale.config import config_tree, config_yaml
from mimscale.console import say
from mimscale.errors import INTERRUPTED_EXIT_CODE, DataError, LostRankError, MimscaleError
from mimscale.models.contract import CONTRACT_FILE, WEIGHTS_FILE
from mimscale.models.transfer import save_weights
from mimscale.stream.device import OnDevice
from mimscale.stream.plan import Position, SamplePlan
from mimscale.train.checkpoint import Checkpoints, Saved
from mimscale.train.config import DATA_KEYS, FREE_KEYS, RunConfig, accumulation
from mimscale.train.engine import Engine, joined_ranks
from mimscale.train.environment import job_record, memory_peak_bytes
from mimscale.train.garbage import collected_between_steps
from mimscale.train.health import Health
from mimscale.train.loop import train
from mimscale.train.meter import Meter
from mimscale.train.objective import Objective
from mimscale.train.preflight import preflight
from mimscale.train.ranks import Ranks
from mimscale.train.run_dir import Outcome, RunDir
from mimscale.train.startup import Startup
from mimscale.train.training_data import TrainingData
from mimscale.train.watchdog import Watchdog
from mimscale.world import StopRequest, World

# When a batch script wants the run to save and leave, in seconds since 1970.
STOP_AT_VARIABLE = "MIMSCALE_STOP_AT_UNIX_S"
# What torch says when the process at the other end of a collective is gone.
LOST_PEER_TEXTS = ("Connection closed", "Connection reset", "remote process", "Broken pipe", "Timed out")


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
            timeout_min = config.engine.collective_timeout_min
            ranks = stack.enter_context(joined_ranks(world, collective_timeout_min=timeout_min))
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
    data = TrainingData(config, objective.overlay, objective.usable)
    objective.begin(data)
    torch.manual_seed(config.seed)
    model = objective.build(data.channels)
    if not any(run.checkpoints.glob("step_*")):
        objective.prepare(model, data, ranks)
    engine = Engine(model, config, ranks)
    startup.ends("build_s")

    def write_weights(folder: Path, step: int, weights: dict[str, Tensor]) -> list[Path]:
        save_weights(folder, weights, {**data.contract(step, engine.precision), **objective.contract()})
        return [folder / WEIGHTS_FILE, folder / CONTRACT_FILE]

    checkpoints = Checkpoints(run, config.checkpoint, engine, ranks, write_weights)
    watchdog.also_watch(checkpoints.writing)
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
        log_cost(step)
        watchdog.alive()

    def log_cost(step: int) -> None:
        peak_bytes = ranks.largest(_peak_memory_bytes(ranks.device))
        meter.log_cost(step, peak_memory_bytes=peak_bytes, job_s=startup.running_s)

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
    log_cost(done)
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


def _peak_memory_bytes(device: torch.device) -> int:
    """The most that this rank has held so far: tensors on its GPU, or the whole process on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else memory_peak_bytes()


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
