"""Real processes are killed with SIGKILL at every step of a save, and at random; nothing that was committed is lost."""

import json
import random
import shutil
import time
from collections import Counter

import pytest
from fakes import FileEngine, checkpoints_of
from fault_injector import run_program
from rank_pool import run_ranks, start_ranks
from stream_stores import write_store
from tiny_runs import SHAPES, pretrain_words, run_of

from mimscale.train import committed
from mimscale.train.run_dir import RunDir

# A process for each n: it saves step 1, then dies at the n-th file operation of saving step 2, on whichever thread.
SAVE_AND_DIE = """
import json, os
from pathlib import Path
import fault_injector
from fakes import FileEngine, checkpoints_of
from mimscale.train.run_dir import RunDir

def save(run, operations):
    engine = FileEngine()
    checkpoints = checkpoints_of(RunDir(run), engine, keep=1, mode=sys.argv[2])
    engine.state = 1
    checkpoints.save(1, {"samples_done": 1})
    checkpoints.commit()
    engine.state = 2
    with fault_injector.kill_at_operation(operations):
        checkpoints.save(2, {"samples_done": 2})
        checkpoints.finish()

codes = []
while not codes or codes[-1] != 0:
    process = os.fork()
    if process == 0:
        save(Path(sys.argv[1]) / f"run{len(codes)}", len(codes))
        os._exit(0)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
print(json.dumps(codes))
"""


@pytest.mark.parametrize("mode", ["background", "sync"])
def test_a_kill_at_any_operation_of_a_save_leaves_a_complete_checkpoint(tmp_path, mode, survived):
    ended = run_program(SAVE_AND_DIE, str(tmp_path), mode)
    assert ended.returncode == 0, ended.stderr
    *killed, whole = json.loads(ended.stdout)
    assert (set(killed), whole) == ({-9}, 0), ended.stderr
    assert len(killed) > 15, "the kills did not reach the protocol"
    steps = []
    for operations in range(len(killed) + 1):
        run, engine = RunDir(tmp_path / f"run{operations}"), FileEngine()
        restored = checkpoints_of(run, engine).restore()
        assert restored.step in (1, 2)
        assert engine.state == restored.step == restored.position["samples_done"]
        assert not list(run.checkpoints.glob(".tmp-*"))
        steps.append(restored.step)
    survived["kill before an operation of a save"] += len(killed)
    assert steps[0] == 1
    assert steps[-1] == 2
    assert steps == sorted(steps), "an older checkpoint after a newer one was committed"


# Continues a run, and saves step after step until the kill comes. The state of step n follows from that of n - 1, so a
# wrong one would show. Restoring, deleting old checkpoints and rewriting the log are under fire too.
TRAIN = """
from pathlib import Path
import fault_injector
from fakes import FileEngine, checkpoints_of
from mimscale.train.committed import step_of, tags
from mimscale.train.config import MeterConfig
from mimscale.train.meter import Meter
from mimscale.train.run_dir import RunDir
from mimscale.world import World

run = RunDir(Path(sys.argv[1]))
fault_injector.arm(fault_injector.kill_at_random_time(seed=int(sys.argv[2]), within_s=float(sys.argv[3])))
engine = FileEngine(ballast_bytes=300_000)
checkpoints = checkpoints_of(run, engine, keep=2, keep_every_steps=5, keep_best="val_loss")
restored = checkpoints.restore()
print("restored", restored.step, engine.state, flush=True)
meter = Meter(run, MeterConfig(tensorboard=False), World(), steps=10**6, global_batch=1)
meter.start(restored.step)
for step in range(restored.step + 1, 10**6):
    engine.state = (engine.state * 31 + step) % 1_000_003
    meter.log_validation(step, {"val_loss": (step * 7919 % 101) / 101})
    checkpoints.save(step, {"samples_done": step})
    print("committed", max(map(step_of, tags(run)), default=0), flush=True)  # whether it commits now or later
"""


def state_of(step: int) -> int:
    state = 0
    for number in range(1, step + 1):
        state = (state * 31 + number) % 1_000_003
    return state


def kill_again_and_again(run: RunDir, kills: int, survived: Counter[str]) -> None:
    run.path.mkdir()
    latest, within_s = 0, 0.25
    for number in range(kills):
        ended = run_program(TRAIN, str(run.path), str(number), str(within_s))
        assert ended.returncode == -14, f"kill {number}: {ended.stderr}"
        # The kill may have cut the last line short.
        lines = [line.split() for line in ended.stdout.splitlines(keepends=True) if line.endswith("\n")]
        if lines:
            _, step, state = lines[0]
            assert int(step) >= latest, f"kill {number}: went on at step {step}, {latest} was committed"
            assert int(state) == state_of(int(step)), f"kill {number}: the state is not that of step {step}"
            before, latest = latest, max([int(step), *(int(line[1]) for line in lines[1:])])
            if latest == before:
                within_s *= 1.3  # a slow machine needs longer for a save
        where = {path.name.removeprefix(".tmp-")[:6] for path in run.checkpoints.glob(".tmp-*")}
        place = "a deletion" if "doomed" in where else "a save" if where else "between saves, or a restore"
        survived[f"kill at a random time, in {place}"] += 1
        if latest:
            newest = committed.newest(run)
            assert newest is not None
            assert committed.step_of(newest) >= latest
    assert latest > kills // 2, "hardly anything was saved between the kills"
    steps = {committed.step_of(tag) for tag in committed.tags(run)}
    assert set(range(5, latest, 5)) <= steps, "a checkpoint that stays for good is gone"
    left = checkpoints_of(run, FileEngine()).restore()
    assert left.step >= latest
    assert not list(run.checkpoints.glob(".tmp-*"))


def test_twenty_kills_at_random_times_lose_nothing_that_was_committed(tmp_path, survived):
    kill_again_and_again(RunDir(tmp_path / "run"), 20, survived)
    assert sum(count for kind, count in survived.items() if kind.endswith("in a save")) >= 3, survived


@pytest.mark.soak
@pytest.mark.two_process
@pytest.mark.timeout(2400)
def test_a_training_run_that_is_killed_ten_times_ends_with_the_weights_of_a_straight_one(tmp_path, survived):
    store = tmp_path / "store"
    write_store(store, SHAPES)
    more = ["steps=30", "checkpoint={every_steps: 1, keep: 2, keep_every_steps: 10}", "validation.every_steps=0"]
    straight = pretrain_words(store, tmp_path / "straight", *more)
    start_s = time.monotonic()
    (ended,) = run_ranks(straight, size=1)
    assert ended.code == 0, ended.err
    whole_s = time.monotonic() - start_s

    words, moments = pretrain_words(store, tmp_path / "killed", *more), random.Random(7)
    run = run_of(words)
    kills = at_work = 0
    while kills < 10:
        # What is committed now is the least that the next start goes on from.
        least = committed.newest(run)
        (rank,) = start_ranks(words, size=1)
        rank.process.join(moments.uniform(0.3, 0.7) * whole_s)
        if rank.process.exitcode is not None:
            shutil.rmtree(run.path)  # it has finished: from the start, so that there is work again
            whole_s *= 0.8  # the straight run also paid for the imports that all share
            continue
        rank.process.kill()
        rank.process.join()
        kills += 1
        said = rank.err.read_text()
        if least is not None and "continues at step" in said:
            at_work += 1
            assert int(said.split("continues at step ")[1].split()[0]) >= committed.step_of(least)
        assert "checkpoint passed over" not in said
        survived["kill of a real training run at a random time"] += 1
    assert at_work >= 3, "no kill came after a start that went on"
    (ended,) = run_ranks(words, size=1)
    assert ended.code == 0, ended.err
    ends = [committed.newest(run_of(words)) / "weights.safetensors" for words in (straight, words)]
    assert ends[0].read_bytes() == ends[1].read_bytes()


@pytest.mark.soak
@pytest.mark.timeout(2400)
def test_two_hundred_kills_at_random_times_lose_nothing_that_was_committed(tmp_path, survived):
    kill_again_and_again(RunDir(tmp_path / "run"), 200, survived)
