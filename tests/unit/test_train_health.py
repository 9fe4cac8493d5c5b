"""When is a loss a spike, a rank slow, a job hung?"""

import json
import re
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from fault_injector import run_program

from mimscale.config import build_config
from mimscale.errors import ConfigError
from mimscale.train.config import HealthConfig
from mimscale.train.health import Health, _Trained
from mimscale.train.health_log import HealthLog
from mimscale.train.rank_times import RankTimes, slow_rank, time_metrics
from mimscale.train.run_dir import RunDir
from mimscale.train.spikes import SpikeDetector
from mimscale.train.watchdog import Watchdog, Writing
from mimscale.world import World


def spikes(losses, **config):
    detector = SpikeDetector(HealthConfig(**{"spike_window": 8, "spike_steps": 2, **config}))
    return [index for index, loss in enumerate(losses) if detector.observe(loss) is not None]


NOISE = [1.0, 1.1, 0.9, 1.05, 0.95, 1.0, 1.1, 0.9]


def test_a_spike_is_so_many_losses_in_a_row_above_the_band_and_reported_once():
    assert spikes([*NOISE, 5.0, 5.0, 5.0, 1.0]) == [9]


def test_a_single_odd_batch_and_a_fall_are_no_spikes():
    assert spikes([*NOISE, 50.0, *NOISE, 50.0, 0.1, 0.1, 0.1]) == []


def test_nothing_is_judged_before_half_a_window():
    assert spikes([1.0, 1.0, 1.0, 9.0, 9.0]) == [] == spikes([9.0])
    assert spikes([1.0, 1.0, 1.0, 1.0, 9.0, 9.0]) == [5]


def test_a_new_level_is_accepted_in_the_end():
    assert spikes([*NOISE, *[5.0] * 20, 5.1, 5.0, 50.0, 50.0]) == [9, 31]


def test_a_loss_that_stands_still_has_a_band_all_the_same():
    assert spikes([*[1.0] * 8, 1.005, 1.005]) == []
    assert spikes([*[1.0] * 8, 1.05, 1.05]) == [9]


def test_losses_of_a_spike_that_was_rolled_back_are_no_measure():
    detector = SpikeDetector(HealthConfig(spike_window=8, spike_steps=2))
    for loss in NOISE:
        detector.observe(loss)
    for again in range(5):
        assert detector.observe(5.0) is None
        assert detector.observe(5.0) is not None, f"spike {again} of those given up has raised the band"
        detector.forget_spike()


def times(*own_s):
    return [RankTimes(rank, f"node{rank // 4}", 2.0, 0.1, own - 0.1) for rank, own in enumerate(own_s)]


def test_the_slowest_rank_is_named_with_its_node_when_it_is_slower_than_the_median_by_the_factor():
    found = slow_rank(times(1.0, 1.0, 1.1, 1.0, 1.0, 1.9), 1.5)
    assert found.startswith("rank 5 on node1 needs 1.90 s a step")
    assert "forward 1.80 s" in found
    assert "the median rank needs 1.00 s" in found
    assert slow_rank(times(1.0, 1.0, 1.1, 1.0, 1.0, 1.4), 1.5) is None
    assert slow_rank(times(1.0, 1.9), 1.5).startswith("rank 1")


def test_a_rank_that_is_slower_by_less_than_the_step_notices_is_not_slow():
    quick = [RankTimes(rank, "n", 2.0, 0.0, own_s) for rank, own_s in enumerate((0.01, 0.01, 0.05))]
    assert slow_rank(quick, 1.5) is None


def test_the_spread_over_the_ranks():
    assert time_metrics(times(1.0, 1.2, 1.1)) == {
        "rank_own_s_median": 1.1,
        "rank_own_s_max": 1.2,
        "rank_data_wait_s_max": 0.1,
        "slowest_rank": 1.0,
    }


def test_events_of_a_repeated_step_count_once_and_a_cut_line_not_at_all(tmp_path):
    log = HealthLog(tmp_path / "health.jsonl")
    assert log.read() == []
    for step in (3, 7, 7, 9):
        log.append(step, "skipped", f"step {step}")
    log.append(4, "slow_rank", "a rank", rank=3)
    with log.path.open("a") as file:
        file.write('{"step": 5, "ev')
    assert log.count("skipped", up_to_step=8) == 2
    assert [line["step"] for line in log.read()] == [3, 7, 7, 9, 4]


@pytest.mark.parametrize(
    "key",
    [
        {"max_skipped": -1},
        {"spike_window": 3},
        {"spike_steps": 0},
        {"hang_timeout_s": 0},
        {"slow_rank_factor": 1.0},
        {"on_spike": "ignore"},
    ],
)
def test_a_health_key_that_makes_no_sense_is_named(key):
    with pytest.raises(ConfigError, match=next(iter(key))):
        build_config(HealthConfig, key, "health")


def watched(tmp_path, world, **config):
    left = []
    dog = Watchdog(RunDir(tmp_path), HealthConfig(**config), world, leave=left.append)
    return dog, left


def wait_until(condition, limit_s=10.0):
    deadline_s = time.monotonic() + limit_s
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert condition()


def test_a_step_within_the_limit_keeps_the_watchdog_quiet_and_it_leaves_nothing(tmp_path):
    dog, left = watched(tmp_path, World(), hang_timeout_s=0.5, first_step_timeout_s=0.5)
    with dog:
        for step in range(4):
            time.sleep(0.25)
            dog.alive(step)
    assert left == []
    assert list(RunDir(tmp_path).logs.iterdir()) == []


def test_the_first_step_has_a_limit_of_its_own(tmp_path):
    dog, left = watched(tmp_path, World(), hang_timeout_s=0.3, first_step_timeout_s=100)
    with dog:
        time.sleep(0.8)
        assert left == []
        dog.alive(1)
        wait_until(lambda: left)
    assert left == [6]
    outcome = RunDir(tmp_path).read_outcome()
    assert (outcome.outcome, outcome.exit_code) == ("failed", 6)
    assert outcome.message.startswith("step 2 was not done within 0.3 s (health.hang_timeout_s); rank 0 on localhost")
    assert "unit/test_train_health.py" in outcome.message


def test_a_rank_follows_the_first_one_that_gives_up_before_its_own_time(tmp_path):
    dog, left = watched(tmp_path, World(), hang_timeout_s=4, first_step_timeout_s=4)
    with dog:
        (RunDir(tmp_path).logs / "hang.json").write_text(json.dumps({"hang_id": "a", "rank": 1}))
        time.sleep(1.5)
        assert left == [], "it is silent for less than half of its time"
        wait_until(lambda: left, 2.0)
    head = json.loads((RunDir(tmp_path).logs / "stacks-rank00000.txt").read_text().splitlines()[0])
    assert (head["hang_id"], head["rank"], head["waits"]) == ("a", 0, False)


def test_a_write_in_the_background_that_does_not_end_is_a_hang_although_steps_are_made(tmp_path):
    dog, left = watched(tmp_path, World(), hang_timeout_s=0.5, first_step_timeout_s=0.5)
    until = threading.Event()
    writer = threading.Thread(target=until.wait, args=(20,))
    writer.start()
    began_s = time.monotonic()
    dog.also_watch(lambda: Writing("step_00000004", writer.ident, began_s))
    with dog:
        deadline_s = time.monotonic() + 10
        while not left and time.monotonic() < deadline_s:
            dog.alive(5)
            time.sleep(0.02)
    until.set()
    writer.join()
    assert left == [6]
    message = RunDir(tmp_path).read_outcome().message
    assert message.startswith("step_00000004 was not written within 0.5 s (health.hang_timeout_s); rank 0 on localhost")
    assert re.search(r" stood at \S+/threading\.py:\d+ wait\. All stacks", message)


def test_a_write_that_ends_in_time_is_no_hang(tmp_path):
    dog, left = watched(tmp_path, World(), hang_timeout_s=0.5, first_step_timeout_s=0.5)
    with dog:
        for step in range(4):
            began_s = time.monotonic()
            dog.also_watch(lambda: Writing("step_00000004", None, began_s))  # noqa: B023
            time.sleep(0.25)
            dog.alive(step)
    assert left == []


# A call into C that keeps the interpreter's lock: no Python of this process runs any more.
KEEP_THE_LOCK = """
import ctypes, time
from mimscale.train.exit_timer import ExitTimer
timer = ExitTimer(6)
timer.start(1000)
timer.start({seconds})
{then}
ctypes.PyDLL(None).usleep(800_000)
"""


@pytest.mark.parametrize(
    ("seconds", "then", "code"),
    [(0.2, "", 6), (0.2, "timer.close()", 0), (0.2, "timer.start(100)", 0), (0.2, "time.sleep(0.5)", 6)],
)
def test_a_process_ends_with_a_code_of_ours_when_time_is_up_although_nobody_gives_the_lock_back(seconds, then, code):
    start_s = time.monotonic()
    assert run_program(KEEP_THE_LOCK.format(seconds=seconds, then=then)).returncode == code
    assert time.monotonic() - start_s < 30


def test_an_outcome_that_another_rank_has_written_stays(tmp_path):
    run = RunDir(tmp_path)
    dog, left = watched(tmp_path, World(), hang_timeout_s=0.2, first_step_timeout_s=0.2)
    run.outcome.write_text('{"outcome": "failed", "exit_code": 3, "step": -1, "message": "the cause"}')
    with dog:
        wait_until(lambda: left)
    assert run.read_outcome().message == "the cause"


class TwoRanks:
    """This is rank 0; rank 1 always says what it is told to."""

    world = World(rank=0, size=2, local_rank=0, local_size=2, node="node0")

    def __init__(self, other):
        self.other, self.gathered = other, 0

    def gather(self, item):
        self.gathered += 1
        return [item, self.other]

    def first_does(self, action):
        return action()


def test_ranks_are_compared_by_their_means_and_only_every_so_many_steps(tmp_path, capsys):
    ranks = TwoRanks(RankTimes(1, "node7", 2.0, 0.8, 1.0))
    config = HealthConfig(compare_ranks_every_steps=3, slow_rank_factor=1.5)
    health = Health(config, RunDir(tmp_path), ranks, tree={}, rollback=lambda: None)
    found = [
        health.compare_ranks(step, {"step_s": 2.0, "data_wait_s": 0.1, "forward_s": forward_s})
        for step, forward_s in ((1, 0.4), (2, 0.5), (3, 0.6))
    ]
    assert found[:2] == [{}, {}]
    assert found[2]["rank_own_s_median"] == pytest.approx(0.6)
    assert (found[2]["rank_own_s_max"], found[2]["slowest_rank"]) == (1.8, 1.0)
    assert ranks.gathered == 1
    (event,) = HealthLog(RunDir(tmp_path).health).read()
    assert (event["step"], event["event"]) == (3, "slow_rank")
    assert "rank 1 on node7 needs 1.80 s a step" in capsys.readouterr().err


def test_a_gradient_that_is_not_finite_on_finite_losses_names_the_rank_with_the_largest(tmp_path):
    other = _Trained(1, "node7", [9.0, 2.0], [["v8"], ["v9"]])
    health = Health(HealthConfig(), RunDir(tmp_path), TwoRanks(other), tree={}, rollback=lambda: None)
    batches = [SimpleNamespace(volume_ids=[name]) for name in ("v1", "v2")]
    health.keep(4, [torch.tensor(1.0), torch.tensor(3.0)], batches)
    assert not health.update_was_made(4, float("inf"))
    (event,) = HealthLog(RunDir(tmp_path).health).read()
    assert "rank 1 on node7: loss 9 on volumes v8; loss 2 on volumes v9" in event["message"]
    assert "rank 0" not in event["message"]
    assert not RunDir(tmp_path).diagnostics.exists(), "the other rank writes the bundle"
