"""What thousands of ranks do to a checkpoint, with one process and fakes."""

import os

import pytest
import torch

from mimscale import durable
from mimscale.bench import simulate, simulate_checkpoint
from mimscale.bench.simulate_checkpoint import committed, ranges_of_ranks, read_own_part, saved
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


def test_the_commit_is_measured_beside_what_grows_with_ranks(tmp_path):
    rows = simulate.simulate([simulate.Scale(ranks=ranks, volumes=4000) for ranks in (8, 64)], repeats=1)
    parts = {row["part"] for row in rows}
    assert parts >= {*simulate.PARTS, "commit of a checkpoint, ZeRO-1", "reading it on a rank, ZeRO-3"}
    assert all(row["seconds"] > 0 and row["peak_bytes"] > 0 for row in rows)
    growth = simulate.exponents(rows, "ranks")
    assert growth["commit of a checkpoint, ZeRO-3"]["bytes"] > growth["commit of a checkpoint, ZeRO-1"]["bytes"]
    assert simulate_checkpoint.STAGES == (1, 3)
