"""What grows with ranks and volumes, with one process and fakes: the start of a run, a checkpoint, a resume."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from mimscale import durable
from mimscale.bench import simulate, simulate_checkpoint
from mimscale.bench.results import read_result
from mimscale.bench.simulate_checkpoint import committed, ranges_of_ranks, read_own_part, saved
from mimscale.cli import main
from mimscale.train.committed import read_manifest
from mimscale.train.run_dir import RunDir

SHAPES = {"a": [5, 3], "b": [1], "c": [2, 2, 2]}
RANKS = 4096


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("ranks", [1, 2, 5, 40])
def test_the_ranks_together_hold_every_element_once(stage, ranks):
    held = {name: [] for name in SHAPES}
    parts = list(ranges_of_ranks(SHAPES, ranks, stage))
    assert len(parts) == ranks
    for ranges in parts:
        for name, start, elements in ranges:
            held[name].extend(range(start, start + elements))
    assert {name: sorted(found) for name, found in held.items()} == {
        name: list(range(torch.Size(shape).numel())) for name, shape in SHAPES.items()
    }


def test_rank_0_of_thousands_hashes_one_file_and_lists_no_folder_of_theirs(tmp_path, monkeypatch):
    hashed, seen, looked_at = [], [], []
    sha256, scandir, stat = durable.sha256_of_file, os.scandir, os.stat

    def listed(path="."):
        with scandir(path) as entries:
            seen.extend(entry.name for entry in entries)
        return scandir(path)

    def watched(path, *args, **kwargs):
        looked_at.append(str(path))
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(durable, "sha256_of_file", lambda path: hashed.append(path.name) or sha256(path))
    monkeypatch.setattr(os, "scandir", listed)
    monkeypatch.setattr(os, "stat", watched)
    tag = committed(RunDir(tmp_path), RANKS, stage=1)
    assert hashed == ["state.json"]
    assert len(seen) < 20
    assert not any("state-rank" in path for path in looked_at)
    assert len(read_manifest(tag)["files"]) == RANKS + 1


@pytest.mark.parametrize("stage", [1, 3])
def test_a_rank_goes_on_from_its_own_file_alone(stage):
    with saved(64, stage) as (tag, rank, pieces):
        for piece in pieces:
            for tensor in piece.tensors.values():
                tensor.fill_(torch.nan)
        read_own_part(tag, rank, 64, pieces)
        assert all((tensor == 0).all() for piece in pieces for tensor in piece.tensors.values())
        assert len(list(tag.glob("state-rank*"))) == 1
        with pytest.raises(AssertionError, match="is missing"):
            read_own_part(tag, rank + 1, 64, pieces)


@pytest.mark.parametrize(("stage", "files"), [(1, 4), (3, 6)])
def test_a_rank_of_half_as_many_reads_the_ranges_of_several(stage, files, monkeypatch):
    monkeypatch.setattr(simulate_checkpoint, "model_shapes", lambda: MODEL)
    with saved(64, stage, readers=32) as (tag, rank, pieces):
        for piece in pieces:
            for tensor in piece.tensors.values():
                tensor.fill_(torch.nan)
        read_own_part(tag, rank, 32, pieces)
        assert pieces
        assert all((tensor == 0).all() for piece in pieces for tensor in piece.tensors.values())
        assert len(list(tag.glob("state-rank*"))) == files  # of 64: two that it verifies, and those that it reads
        with pytest.raises(AssertionError, match="is missing"):
            read_own_part(tag, rank + 5, 32, pieces)


MODEL = {f"blocks.{number}.{name}": shape for number in range(8) for name, shape in (("w", [96, 96]), ("b", [96]))}
OF_RANKS = [simulate.Scale(ranks=ranks, volumes=8000) for ranks in (64, 512)]
OF_VOLUMES = [simulate.Scale(ranks=64, volumes=volumes) for volumes in (1000, 8000)]


@pytest.mark.parametrize(("by", "scales"), [("ranks", OF_RANKS), ("volumes", OF_VOLUMES)])
def test_nothing_takes_more_memory_than_in_proportion_and_what_does_is_found(by, scales, monkeypatch):
    """Bytes, which are the same in each run; seconds of sizes this small are calls."""
    monkeypatch.setattr(simulate_checkpoint, "model_shapes", lambda: MODEL)
    planted = lambda scale, plan: np.ones((getattr(scale, by), getattr(scale, by)), bool)  # noqa: E731
    monkeypatch.setattr(simulate, "PARTS", {**simulate.PARTS, "planted": planted})
    rows = simulate.simulate(scales, repeats=1)
    growth = simulate.exponents(rows, by)
    assert [part for part, exponent in growth.items() if exponent["bytes"] > 1.1] == ["planted"]
    assert "planted" in simulate.worse_than_linear(growth)
    assert growth.keys() >= {
        *simulate.PARTS,
        "`mimscale plan`, legal nodes",
        "preflight: judging the ranks",
        "the store, opened to train on",
        *(f"{name}, ZeRO-{stage}" for name in OF_CHECKPOINTS for stage in simulate_checkpoint.STAGES),
    }
    assert all(row["seconds"] > 0 and row["peak_bytes"] > 0 for row in rows)
    grows = "preflight: judging the ranks" if by == "ranks" else "the store, opened to train on"
    assert growth[grows]["bytes"] > 0.8


OF_CHECKPOINTS = ("commit of a checkpoint", "reading it on a rank", "going on with half the ranks")


def test_the_verb_measures_every_size_and_says_what_grows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(simulate_checkpoint, "model_shapes", lambda: MODEL)
    monkeypatch.setattr(simulate, "_LONG_ENOUGH_S", 1e-9)  # so that each part runs once
    assert main(["bench", "simulate", "--nodes=8", "--volumes=512", f"--out={tmp_path}", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert read_result(tmp_path) == result
    assert sorted({row["ranks"] for row in result["by_ranks"]}) == [1, 4, 16, 64]
    assert sorted({row["volumes"] for row in result["by_volumes"]}) == [64, 128, 256, 512]
    assert result["worse_than_linear"].keys() == result["exponents"].keys() == {"ranks", "volumes"}
    text = (tmp_path / "bench.md").read_text()
    assert "64 ranks, 512 volumes" in text
    assert all(f"| {row['part']} |" in text for row in result["by_ranks"])
    assert (tmp_path / "bench.png").stat().st_size > 1000


@pytest.mark.parametrize("worse", [[], ["plan of all samples"]])
def test_the_table_names_what_is_worse_than_linear(worse):
    row = {"part": "plan of all samples", "ranks": 64, "volumes": 512, "seconds": 0.001, "peak_bytes": 10**6}
    growth = {"plan of all samples": {"seconds": 1.0, "bytes": 2.0}}
    text = simulate.as_markdown(
        {
            "by_ranks": [row],
            "exponents": {"ranks": growth, "volumes": growth},
            "worse_than_linear": {"ranks": worse, "volumes": []},
        }
    )
    assert "| plan of all samples | 1.00 | 1.00 | 1.00 | 2.00 | 1.00 | 2.00 |" in text
    said = "worse than linear: plan of all samples" if worse else "nothing grows worse than linearly"
    assert text.endswith(f"{said}\n")


RECORDED = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("simulate_*.json"))


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_nothing_in_the_recorded_simulation_is_worse_than_linear(path):
    tree = json.loads(path.read_text())
    assert max(row["ranks"] for row in tree["by_ranks"]) == RANKS
    assert max(row["volumes"] for row in tree["by_volumes"]) == 400_000
    assert tree["worse_than_linear"] == {"ranks": [], "volumes": []}
    for by in ("ranks", "volumes"):
        growth = simulate.exponents(tree[f"by_{by}"], by)
        assert growth == tree["exponents"][by]
        assert simulate.worse_than_linear(growth) == []
