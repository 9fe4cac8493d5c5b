"""The loop with fakes: what happens in which order, whatever engine and data are behind it."""

import json
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from fakes import OneRank
from safetensors.torch import load_file

from mimscale.errors import DataError
from mimscale.train.config import HealthConfig, MeterConfig
from mimscale.train.health import Health
from mimscale.train.health_log import HealthLog
from mimscale.train.loop import train
from mimscale.train.meter import Meter
from mimscale.train.run_dir import RunDir
from mimscale.world import World

STEPS, ACCUMULATION = 12, 2


class Sums:
    def __init__(self, values):
        self.values = {name: float(value) for name, value in values.items()}

    def wait(self):
        return self.values


class Ranks(OneRank):
    def sum(self, values):
        return Sums(values)


@dataclass
class Engine:
    """State is one number that depends on every batch and on their order."""

    state: int = 0
    micro_batches: int = 0
    rates: list = field(default_factory=list)
    norm: float = 0.0
    before_step: int = 0

    def seed_micro_batch(self, step, micro_index):
        assert micro_index == self.micro_batches % ACCUMULATION

    def set_learning_rate(self, step):
        self.rates.append(step)
        return 1.0

    def backward(self, loss):
        if self.micro_batches % ACCUMULATION == 0:
            self.before_step, self.norm = self.state, 0.0
        self.state = (self.state * 31 + int(loss.nan_to_num())) % 9973
        self.norm += 0.0 if loss.isfinite() else float("nan")

    def step(self):
        self.micro_batches += 1
        if self.micro_batches % ACCUMULATION == 0 and self.norm != 0.0:
            self.state = self.before_step

    def grad_norm(self):
        return self.norm


class Batches:
    def __init__(self, start):
        self.next = start * ACCUMULATION

    def __next__(self):
        self.next += 1
        sample_ids = torch.tensor([self.next - 1])
        return SimpleNamespace(
            sample_ids=sample_ids,
            volume_ids=[f"v{self.next - 1}"],
            seeds=[self.next],
            spacing_mm=[(1.0, 1.0, 1.0)],
            batch_index=(self.next - 1) // ACCUMULATION,
            volume=sample_ids,
            tensors=lambda: {"volume": sample_ids},
            substituted=0,
            voxels_decoded=100.0,
            bytes_read=30.0,
        )


class Keeper:
    """Saved states by step, as checkpoints would hold them."""

    def __init__(self):
        self.saved = {0: 0}


def run(tmp_path, keeper, *, stop_at=None, bad=(), jumps=(), every=5, **health):
    """`bad`: samples whose loss is NaN; `jumps`: samples whose loss is a thousand times as large."""
    first = max(keeper.saved)
    engine = Engine(state=keeper.saved[first])
    seen = []

    def loss_of(batch):
        number = int(batch.sample_ids[0])
        value = float(engine.state % 50 + 100 + number % 7) * (1000 if number in jumps else 1)
        return torch.tensor(float("nan") if number in bad else value)

    def roll_back():
        engine.state = keeper.saved[max(keeper.saved)]
        return max(keeper.saved)

    def stop_wanted():
        return stop_at is not None and len(engine.rates) + first >= stop_at

    run_dir = RunDir(tmp_path)
    watch = Health(HealthConfig(**health), run_dir, Ranks(), tree={"seed": 1}, rollback=roll_back)
    with Meter(run_dir, MeterConfig(tensorboard=False), World(), steps=STEPS, global_batch=2) as meter:
        meter.start(first)
        watch.start(first)
        done = train(
            first_step=first,
            steps=STEPS,
            accumulation=ACCUMULATION,
            engine=engine,
            ranks=Ranks(),
            batches=Batches(first),
            loss_of=loss_of,
            meter=meter,
            health=watch,
            stop_wanted=stop_wanted,
            save=lambda step: keeper.saved.update({step: engine.state}),
            save_due=lambda step: step % every == 0,
            validate=lambda: {"val_loss": 1.0},
            validation_due=lambda step: seen.append(step) or False,
            take_yardsticks=lambda: {"mean_voxel": 200.0},
        )
    return done, [line for line in run_dir.read_metrics() if "loss" in line]


def losses(lines):
    return {line["step"]: line["loss"] for line in lines}


def test_an_interrupted_run_repeats_the_losses_of_a_straight_one(tmp_path):
    straight_keeper, keeper = Keeper(), Keeper()
    _, straight = run(tmp_path / "a", straight_keeper)
    done, _ = run(tmp_path / "b", keeper, stop_at=6)
    assert done == 7, "the flag of step 6 is read in step 7, where all ranks leave"
    assert max(keeper.saved) == 7
    done, both = run(tmp_path / "b", keeper)
    assert done == STEPS
    assert losses(both) == losses(straight)
    assert len(both) == STEPS, "a step logged twice or never"
    assert keeper.saved[STEPS] == straight_keeper.saved[STEPS]


def test_steps_after_the_last_checkpoint_of_a_killed_run_are_logged_once(tmp_path, capsys):
    keeper = Keeper()
    _, straight = run(tmp_path, keeper)
    del keeper.saved[STEPS]  # as if it had been killed before the last save
    _, again = run(tmp_path, keeper)
    assert losses(again) == losses(straight)
    assert len(again) == STEPS
    assert "2 logged step(s) after step 10 were not saved and are repeated" in capsys.readouterr().err


def test_a_stop_at_the_last_step_finishes(tmp_path):
    keeper = Keeper()
    done, _ = run(tmp_path, keeper, stop_at=STEPS)
    assert done == STEPS
    assert STEPS in keeper.saved


def test_an_update_that_is_not_finite_is_left_out_and_the_data_go_on(tmp_path, capsys):
    straight, keeper = Keeper(), Keeper()
    run(tmp_path / "a", straight, every=1)
    done, lines = run(tmp_path / "b", keeper, bad=(7,), every=1)
    assert done == STEPS
    assert keeper.saved[3] == straight.saved[3]
    assert keeper.saved[4] == keeper.saved[3], "the update of step 4 was made after all"
    assert [line["step"] for line in lines] == [1, 2, 3, *range(5, STEPS + 1)], "a step without a loss has one"
    (skipped,) = [line for line in RunDir(tmp_path / "b").read_metrics() if line.get("skipped_steps")]
    assert (skipped["step"], skipped["skipped_steps"]) == (4, 1.0)
    assert "rank 0 on localhost: loss nan on volumes v7\n" in capsys.readouterr().err, "v6 was innocent"
    (event,) = HealthLog(RunDir(tmp_path / "b").health).read()
    assert (event["step"], event["event"], event["volume_ids"]) == (4, "skipped", ["v6", "v7"])


def test_a_skipped_step_leaves_what_it_trained_on(tmp_path):
    run(tmp_path, Keeper(), bad=(7,))
    folder = RunDir(tmp_path).diagnostics / "step_00000004-rank00000"
    facts = json.loads((folder / "facts.json").read_text())
    assert facts["config"] == {"seed": 1}
    assert [batch["loss"] for batch in facts["micro_batches"]][1] == "nan"
    assert [batch["seeds"] for batch in facts["micro_batches"]] == [[7], [8]]
    assert [batch["sample_ids"] for batch in facts["micro_batches"]] == [[6], [7]]
    assert load_file(folder / "batch-1.safetensors")["volume"].tolist() == [7]


def test_one_bad_step_too_many_ends_the_run_and_is_not_saved(tmp_path):
    keeper = Keeper()
    with pytest.raises(DataError, match=r"(?s)step 4: .*loss nan on volumes v7\n.*health.max_skipped=1") as error:
        run(tmp_path, keeper, bad=(2, 7), every=4, max_skipped=1)
    assert error.value.exit_code == 3
    assert max(keeper.saved) == 0
    assert [event["event"] for event in HealthLog(RunDir(tmp_path).health).read()] == ["skipped", "stopped"]


def test_skipped_steps_of_earlier_jobs_count(tmp_path):
    keeper = Keeper()
    run(tmp_path, keeper, bad=(2,), stop_at=3, max_skipped=1)
    with pytest.raises(DataError, match=r"These were 2 such steps"):
        run(tmp_path, keeper, bad=(2, 15), max_skipped=1)


SPIKE = {"spike_window": 6, "spike_steps": 2, "jumps": (12, 13, 14, 15)}  # steps 7 and 8


def test_a_spike_is_reported_once_and_changes_nothing_by_default(tmp_path, capsys):
    done, lines = run(tmp_path, Keeper(), **SPIKE)
    assert done == STEPS == len(lines)
    (event,) = HealthLog(RunDir(tmp_path).health).read()
    assert (event["step"], event["event"]) == (8, "spike")
    assert event["loss"] > event["threshold"] > event["median"]
    assert "step 8: loss" in capsys.readouterr().err


def test_a_rollback_takes_the_weights_of_the_last_checkpoint_and_the_data_behind_the_spike(tmp_path):
    keeper = Keeper()
    done, lines = run(tmp_path, keeper, on_spike="rollback", **SPIKE)
    assert done == STEPS
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1)), "a batch was trained on twice"
    spike, back = HealthLog(RunDir(tmp_path).health).read()
    assert (spike["step"], spike["event"]) == (8, "spike")
    # The loss of step 8 is read when step 9 has been made.
    assert (back["step"], back["event"], back["to_step"], back["steps_undone"]) == (9, "rolled_back", 5, 4)
    engine = Engine(state=keeper.saved[5])
    for number in range(18, 20):  # step 10 begins where the checkpoint of step 5 ended
        engine.backward(torch.tensor(float(engine.state % 50 + 100 + number % 7)))
    after = Engine(state=engine.state)
    assert lines[9]["loss"] != lines[8]["loss"]
    assert keeper.saved[10] == after.state


def test_a_spike_that_comes_back_after_the_last_rollback_ends_the_run(tmp_path):
    jumps = tuple(range(12, 24))
    with pytest.raises(DataError, match=r"1 rollback\(s\) did not help \(health.max_rollbacks=1\); lower optim.lr"):
        run(tmp_path, Keeper(), on_spike="rollback", max_rollbacks=1, **{**SPIKE, "jumps": jumps})


def test_the_loss_is_logged_relative_to_its_yardsticks(tmp_path):
    _, lines = run(tmp_path, Keeper())
    assert all(line["loss_vs_mean_voxel"] == pytest.approx(line["loss"] / 200) for line in lines)


def test_metrics_carry_the_documented_keys(tmp_path):
    _, lines = run(tmp_path, Keeper())
    assert {"step", "loss", "lr", "samples_per_s", "data_wait_s", "step_s", "grad_norm"} <= lines[0].keys()
    assert (lines[0]["voxels_decoded_per_crop"], lines[0]["bytes_read_per_crop"]) == (100.0, 30.0)


def test_the_wall_clock_goes_on_where_the_checkpoint_was_saved_that_a_job_continues_from(tmp_path):
    jobs = [(0, [(5, 40.0), (8, 65.0)]), (5, [(10, 30.0)])]  # the first one was killed while it saved step 8
    for first, saves in jobs:
        with Meter(RunDir(tmp_path), MeterConfig(tensorboard=False), World(), steps=STEPS, global_batch=2) as meter:
            meter.start(first)
            for step, job_s in saves:
                meter.log_cost(step, peak_memory_bytes=step * 1e9, job_s=job_s)
    lines = RunDir(tmp_path).read_metrics()
    assert [(line["step"], line["wall_s"]) for line in lines] == [(5, 40.0), (10, 70.0)]
    assert [line["peak_memory_bytes"] for line in lines] == [5e9, 10e9]
