"""The loop with fakes: what happens in which order, whatever engine and data are behind it."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from fakes import OneRank

from mimscale.errors import DataError
from mimscale.train.config import MeterConfig
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

    def seed_micro_batch(self, step, micro_index):
        assert micro_index == self.micro_batches % ACCUMULATION

    def set_learning_rate(self, step):
        self.rates.append(step)
        return 1.0

    def backward(self, loss):
        self.state = (self.state * 31 + int(loss.nan_to_num())) % 9973

    def step(self):
        self.micro_batches += 1

    def grad_norm(self):
        return 0.0


class Batches:
    def __init__(self, start):
        self.next = start * ACCUMULATION

    def __next__(self):
        self.next += 1
        sample_ids = torch.tensor([self.next - 1])
        counts = {"substituted": 0, "voxels_decoded": 100.0, "bytes_read": 30.0}
        return SimpleNamespace(sample_ids=sample_ids, volume_ids=[f"v{self.next - 1}"], **counts)


class Keeper:
    """Saved states by step, as checkpoints would hold them."""

    def __init__(self):
        self.saved = {0: 0}


def run(tmp_path, keeper, *, stop_at=None, loss_at=None, every=5):
    first = max(keeper.saved)
    engine = Engine(state=keeper.saved[first])
    seen = []

    def loss_of(batch):
        number = int(batch.sample_ids[0])
        value = float(engine.state + number % 7) if loss_at is None or number != loss_at else float("nan")
        return torch.tensor(value)

    def stop_wanted():
        return stop_at is not None and len(engine.rates) + first >= stop_at

    run_dir = RunDir(tmp_path)
    with Meter(run_dir, MeterConfig(tensorboard=False), World(), steps=STEPS, global_batch=2) as meter:
        meter.start(first)
        done = train(
            first_step=first,
            steps=STEPS,
            accumulation=ACCUMULATION,
            engine=engine,
            ranks=Ranks(),
            batches=Batches(first),
            loss_of=loss_of,
            meter=meter,
            stop_wanted=stop_wanted,
            save=lambda step: keeper.saved.update({step: engine.state}),
            save_due=lambda step: step % every == 0,
            validate=lambda: {"val_loss": 1.0},
            validation_due=lambda step: seen.append(step) or False,
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


def test_a_loss_that_is_not_finite_names_step_and_volumes_and_is_not_saved(tmp_path):
    keeper = Keeper()
    with pytest.raises(
        DataError, match=r"step 4: the loss is nan, its gradient norm 0.0; this rank trained on volumes v6, v7"
    ):
        run(tmp_path, keeper, loss_at=6, every=4)
    assert max(keeper.saved) == 0


def test_metrics_carry_the_documented_keys(tmp_path):
    _, lines = run(tmp_path, Keeper())
    assert {"step", "loss", "lr", "samples_per_s", "data_wait_s", "step_s", "grad_norm"} <= lines[0].keys()
    assert (lines[0]["voxels_decoded_per_crop"], lines[0]["bytes_read_per_crop"]) == (100.0, 30.0)
