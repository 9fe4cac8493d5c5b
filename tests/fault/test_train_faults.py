"""What a training run says and leaves behind when something is wrong."""

import os
import re
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from disks import small_disk
from planted_faults import data_error_and_leaving_that_waits
from rank_pool import run_ranks
from stream_stores import write_store
from tiny_runs import SHAPES, pretrain_words, run_of

from mimscale.cli import main
from mimscale.train import checkpoint, committed
from mimscale.train.run_dir import RunDir

pytestmark = pytest.mark.two_process


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    write_store(folder, SHAPES)
    return folder


@pytest.fixture(scope="module")
def finished(store, tmp_path_factory) -> list[str]:
    """The words of a run that has finished 4 steps with two checkpoints."""
    words = pretrain_words(store, tmp_path_factory.mktemp("runs") / "run", "steps=4", "checkpoint.every_steps=2")
    (ended,) = run_ranks(words, size=1)
    assert ended.code == 0, ended.err
    return words


def test_a_run_of_another_model_is_refused_with_exit_code_2(finished):
    (ended,) = run_ranks([*finished, "model.depth=3", "seed=5"], size=1)
    assert ended.code == 2
    assert "model.depth: 2 -> 3" in ended.err
    assert "seed: 0 -> 5" in ended.err


def test_a_state_of_an_earlier_version_is_refused_with_exit_code_4_on_every_rank(finished):
    manifests = [tag / committed.MANIFEST for tag in committed.tags(run_of(finished))]
    texts = [path.read_text() for path in manifests]
    for path, text in zip(manifests, texts, strict=True):
        path.write_text(text.replace(f'"manifest_version": {committed.MANIFEST_VERSION}', '"manifest_version": 1'))
    ended = run_ranks([*finished, "steps=6"], size=2)
    for path, text in zip(manifests, texts, strict=True):
        path.write_text(text)
    assert [rank.code for rank in ended] == [4, 4]
    assert "step_00000004: manifest version 1 holds the training state in DeepSpeed's files" in ended[0].err


def test_a_run_leaves_nothing_in_shared_memory(store, tmp_path):
    before = set(os.listdir("/dev/shm"))
    ended = run_ranks(pretrain_words(store, tmp_path / "run", "steps=2"), size=2)
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    assert set(os.listdir("/dev/shm")) <= before


def test_a_rank_that_fails_alone_says_why_at_once_and_waits_for_no_other(store, tmp_path):
    words, waited = pretrain_words(store, tmp_path / "run"), tmp_path / "waited"
    ended = run_ranks(words, plant=partial(data_error_and_leaving_that_waits, 1, 3, waited))
    assert not waited.with_suffix(".rank1").exists()
    assert [rank.code for rank in ended] == [6, 3], ended[1].err
    assert "pack 7 is broken; ingest it again" in ended[1].err
    outcome = run_of(words).read_outcome()
    assert (outcome.outcome, outcome.exit_code) == ("failed", 3)
    assert "pack 7 is broken" in outcome.message


def test_a_store_that_is_none_is_a_data_error(tmp_path):
    (ended,) = run_ranks(pretrain_words(tmp_path / "nothing", tmp_path / "run"), size=1)
    assert ended.code == 3
    assert str(tmp_path / "nothing") in ended.err
    assert RunDir(tmp_path / "run").read_outcome().outcome == "failed"


def test_a_run_whose_checkpoints_are_all_broken_stops_with_exit_code_4_and_names_each(finished):
    run = run_of(finished)
    for tag in committed.tags(run):
        shard = tag / "state-rank00000.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1])
    (ended,) = run_ranks([*finished, "steps=6"], size=1)
    assert ended.code == 4
    assert "step_00000002: state-rank00000.safetensors has" in ended.err
    assert "step_00000004: state-rank00000.safetensors has" in ended.err
    assert "never goes back to step 0 by itself" in ended.err
    outcome = run.read_outcome()
    assert (outcome.outcome, outcome.exit_code) == ("failed", 4)
    assert max(line["step"] for line in run.read_metrics()) == 4, "it trained after all"


def fill_the_disk(words: list[str]) -> int:
    """`mimscale WORDS` on a disk that somebody else fills after the look at its free space."""
    make_room = checkpoint.Checkpoints._make_room
    checkpoint.Checkpoints._make_room = lambda self, temporary, needed_bytes: make_room(self, temporary, 0)
    return main(words)


@pytest.mark.parametrize(
    ("body", "how", "last_step"),
    [
        (main, "mode: sync", 4),
        (fill_the_disk, "mode: sync", 4),
        (fill_the_disk, "mode: background", None),
        (main, "mode: background, on_failure: continue", 20),
    ],
)
def test_a_full_disk_ends_both_ranks_as_configured_and_keeps_the_last_good_checkpoint(
    store, tmp_path, body, how, last_step, survived
):
    with small_disk(tmp_path / "disk", size_kb=900) as disk:  # it holds one checkpoint of this run, but not two
        run = RunDir(disk / "run")
        words = pretrain_words(store, run.path, f"checkpoint={{every_steps: 2, keep: 9, {how}}}")
        ended = run_ranks([*words, "meter.record_samples=false", "validation.every_steps=0"], body=body)
        assert ended[0].code == 4, ended[0].err
        if last_step is not None:  # else rank 0 may fail to report a step, and rank 1 hears only that it is gone
            assert ended[1].code == 4
            assert max(line["step"] for line in run.read_metrics()) == last_step
            lacking = r"step_0+4: not saved \(it takes \d+ bytes, \d+ are free on its disk, \d+ bytes are missing\)"
            assert re.search(lacking, ended[0].err)
        went_on = ended[0].err.count("Training goes on (checkpoint.on_failure=continue)")
        assert went_on == (9 if "continue" in how else 0)
        good = committed.newest(run)
        assert good is not None
        assert committed.tags(run)[0] == good, "a broken checkpoint has a final name"
        assert not list(run.checkpoints.glob(".tmp-*"))
        survived["full disk in a save"] += 1


def die_inside_the_second_save(words: list[str]) -> int:
    """`mimscale WORDS`, but rank 1 is killed while it writes its part of the second checkpoint."""
    from mimscale.train.state import Snapshot

    write = Snapshot.write
    written = []

    def write_and_die(self: Snapshot, folder: Path):
        if len(written) == 1 and os.environ["RANK"] == "1":
            (folder / "state-rank00001.safetensors").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(folder)
        return write(self, folder)

    Snapshot.write = write_and_die
    return main(words)


def test_a_rank_that_dies_inside_a_save_ends_the_run_and_the_checkpoint_before_is_used(store, tmp_path, survived):
    words = pretrain_words(store, tmp_path / "run", "checkpoint.every_steps=5", "meter.record_samples=false")
    start_s = time.monotonic()
    ended = run_ranks(words, body=die_inside_the_second_save)
    assert time.monotonic() - start_s < 100, "the start of two ranks on a busy machine, and no wait for the dead one"
    assert [rank.code for rank in ended] == [6, -9], ended[0].err
    assert "another rank is gone or hangs" in ended[0].err
    run = run_of(words)
    assert (run.read_outcome().outcome, run.read_outcome().exit_code) == ("failed", 6)
    assert [tag.name for tag in committed.tags(run)] == ["step_00000005"]
    (continued,) = run_ranks([*words, "steps=6"], size=1)  # on what is left
    assert continued.code == 0, continued.err
    assert "continues at step 5 of 6" in continued.err
    assert not list(run.checkpoints.glob(".tmp-*"))
    survived["kill of one rank inside a save"] += 1


@pytest.mark.parametrize("size_kb", [4, 12, 20, 28, 64])  # another file meets the end of each
def test_a_disk_that_is_full_while_a_run_starts_or_reports_ends_it_in_words(store, tmp_path, size_kb):
    with small_disk(tmp_path / "disk", size_kb) as disk:
        words = pretrain_words(store, disk / "run", "steps=500", "meter.tensorboard=true", "meter.record_samples=false")
        (ended,) = run_ranks([*words, "validation.every_steps=0", "checkpoint.every_steps=1000"], size=1)
        # What the ranks find before they start, what belongs to the run directory, what the run reports.
        assert ended.code in (3, 4, 5), ended.err
        assert "the disk is full" in ended.err.splitlines()[-1], ended.err
        assert not list(disk.rglob(".tmp-*"))
