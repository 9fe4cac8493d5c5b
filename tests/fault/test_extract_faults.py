"""An extraction that is killed, on a damaged store, or whose own files are damaged."""

import os
import signal
from dataclasses import replace
from functools import partial

import pytest
from feature_samples import make_cohort
from rank_pool import run_ranks
from small_segmentation import make_pretrain_run

from mimscale.cli import main
from mimscale.errors import DataError
from mimscale.features.config import ExtractConfig
from mimscale.features.layout import read_features
from mimscale.features.run import extract
from mimscale.store import layout
from mimscale.store.manifest import load_manifest


@pytest.fixture
def store(tmp_path):
    return make_cohort(tmp_path / "cohort", subjects=2)


@pytest.fixture
def run(tmp_path, store):
    return make_pretrain_run(tmp_path / "run", store)


def config_of(run, out, **options):
    return ExtractConfig(run_dir=run, out=out, part_volumes=2, threads=1, device="cpu", **options)


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def kill_before_receipt(number: int, rank: int) -> None:
    """SIGKILL when the tables of so many parts have been written, but not the receipt of the last."""
    from mimscale.features import extract as module

    write_receipt, calls = module.write_receipt, []

    def write_or_die(*words, **options):
        calls.append(None)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        write_receipt(*words, **options)

    module.write_receipt = write_or_die


def kill_in_token_map(rank: int) -> None:
    """SIGKILL in the middle of a zip."""
    from mimscale.features.tokens import TokenWriter

    add, calls = TokenWriter.add, []

    def add_and_die(*words, **options):
        add(*words, **options)
        calls.append(None)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    TokenWriter.add = add_and_die


@pytest.mark.parametrize("plant", [partial(kill_before_receipt, 2), kill_in_token_map], ids=["receipt", "zip"])
def test_kill_9_leaves_nothing_half_and_the_same_command_gives_the_bytes_of_a_straight_run(run, tmp_path, plant):
    words = ["extract", f"run_dir={run}", "part_volumes=2", "tokens=true", "threads=1", "device=cpu"]
    killed = tmp_path / "killed"
    (ended,) = run_ranks([*words, f"out={killed}"], size=1, plant=plant)
    assert ended.code == -signal.SIGKILL
    assert len(list(killed.glob("receipts/*.json"))) == 1
    with pytest.raises(DataError, match="extraction that has ended"):
        read_features(killed)
    extract(config_of(run, tmp_path / "straight", tokens=True))
    assert main([*words, f"out={killed}"]) == 0
    assert files_of(killed) == files_of(tmp_path / "straight")


def damage(store, index):
    """Flip a byte of a volume's voxels; returns its id and what puts the byte back."""
    row = load_manifest(store).row(index)
    pack = layout.pack_path(store, row.part)
    whole = pack.read_bytes()
    data = bytearray(whole)
    data[row.offset_bytes + 100] ^= 0xFF
    pack.write_bytes(data)
    return row.id, lambda: pack.write_bytes(whole)


def test_a_damaged_volume_is_named_the_exit_code_says_so_and_a_repair_completes_the_rest(store, run, tmp_path, capsys):
    extract(config_of(run, tmp_path / "straight"))
    volume_id, repair = damage(store, 3)
    words = ["extract", f"run_dir={run}", f"out={tmp_path / 'f'}", "part_volumes=2", "threads=1", "device=cpu"]
    assert main(words) == 3
    said = capsys.readouterr().err
    assert f"1 of 8 volumes have no features, max_failed=0:\n  {volume_id}: volume {volume_id}:" in said
    assert not (tmp_path / "f" / "features.json").exists()

    assert main([*words, "merge=true", "max_failed=1"]) == 0
    features = read_features(tmp_path / "f")
    assert volume_id not in features.ids
    assert len(features.ids) == 7
    assert [entry["id"] for entry in features.contract["failed"]] == [volume_id]

    repair()
    assert main(words) == 0
    assert "3 of 4 parts are finished already" in capsys.readouterr().err
    assert files_of(tmp_path / "f") == files_of(tmp_path / "straight")


def test_a_task_with_a_damaged_volume_does_the_others_and_says_so(store, run, tmp_path):
    volume_id, _ = damage(store, 3)
    config = config_of(run, tmp_path / "f")
    with pytest.raises(DataError, match=rf"task 1/2: 1 volumes cannot be read, max_failed=0 \(first {volume_id}: "):
        extract(replace(config, task="1/2"))
    assert len(list((tmp_path / "f" / "receipts").iterdir())) == 2
    assert extract(replace(config, task="0/2"))["failed"] == []


def test_weights_that_answer_with_nan_make_no_features(store, run, tmp_path, monkeypatch):
    from mimscale.features.encoder import FrozenEncoder

    tokens = FrozenEncoder.tokens
    monkeypatch.setattr(FrozenEncoder, "tokens", lambda self, windows: tokens(self, windows) * float("nan"))
    with pytest.raises(DataError, match="numbers that are not finite"):
        extract(config_of(run, tmp_path / "f"))
    with pytest.raises(DataError, match="not one volume has features"):
        extract(config_of(run, tmp_path / "f", merge=True, max_failed=8))
    assert not (tmp_path / "f" / "features.json").exists()


def test_a_damaged_part_is_named_and_done_again_without_its_receipt(run, tmp_path, capsys):
    config = config_of(run, tmp_path / "f")
    extract(config)
    before = files_of(tmp_path / "f")
    part = tmp_path / "f" / "parts" / "features-00001.parquet"
    data = bytearray(part.read_bytes())
    data[40] ^= 0xFF
    part.write_bytes(data)
    with pytest.raises(DataError, match=r"features-00001\.parquet: damaged .* remove .*part-00001\.json"):
        extract(config)
    assert not (tmp_path / "f" / "features.json").exists()
    (tmp_path / "f" / "receipts" / "part-00001.json").unlink()
    extract(config)
    part.write_bytes(part.read_bytes()[:50])  # cut short: seen by its size, without being told
    extract(config)
    assert files_of(tmp_path / "f") == before


def test_a_disk_that_is_full_is_said_and_leaves_nothing(run, tmp_path, monkeypatch):
    def full(*words, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mimscale.features.layout.pq.ParquetWriter", full)
    with pytest.raises(DataError, match=r"features-00000\.parquet: the disk is full .* finished parts are kept"):
        extract(config_of(run, tmp_path / "f"))
    monkeypatch.undo()
    assert not list((tmp_path / "f").rglob(".tmp-*"))
    assert not list((tmp_path / "f").glob("parts/*"))
