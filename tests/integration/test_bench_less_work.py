"""The benchmark of ways to do less work, on sizes that take seconds: every way is timed, trained and compared."""

import json
import sys

import pytest
from benchmark_modules import benchmark
from rank_pool import run_ranks
from store_samples import make_store


def bench_tiny(words):
    """In a process of its own: `bench_less_work.py WORDS` on a small store and a size that takes a second."""
    store, *words = words
    bench = benchmark("bench_less_work")
    crop = ["crop_voxels=[16,16,16]", "patch_voxels=[8,8,8]", "model={dim: 48, depth: 1, heads: 4}", "modality=null"]
    bench.SIZES.clear()
    bench.SIZES["tiny"] = (["pretrain_mae_vit_b", *crop], 2)
    bench.SMALL[:] = ["demo/pretrain", *crop]
    bench._store = lambda folder: store
    sys.argv = ["bench_less_work.py", *words]
    return bench.main()


def test_every_way_is_timed_and_trained_from_one_seed(tmp_path):
    store = make_store(tmp_path / "store", count=4, val_fraction=0.25)
    words = ["--quick", "--repeats=1", "--seconds=0.01", "--train-seconds=0.3", "--views=16", f"--out={tmp_path}"]
    (ended,) = run_ranks([str(store), *words], size=1, body=bench_tiny)
    assert ended.code == 0, ended.err
    (path,) = tmp_path.glob("less_work_unnamed_*.json")
    tree = json.loads(path.read_text())
    ways = benchmark("bench_less_work").WAYS
    assert [row["way"] for row in tree["rows"]] == list(ways) == [row["name"] for row in tree["speed"]["tiny"]]
    assert tree["rows"][0]["times"] == {"tiny": 1.0}
    for row in tree["rows"]:
        assert 0 < row["loss_after_time"][0] <= row["loss_after_time"][1] <= row["loss_after_time"][2]
        assert row["loss_after_views"] is None or row["loss_after_views"][0] > 0
        curve = tree["curves"][row["way"]]
        assert curve[-1]["cpu_s"] >= 0.3
        assert [point["views"] for point in curve] == sorted(point["views"] for point in curve)
    assert "views in that time" in path.with_suffix(".md").read_text()


def test_losses_are_compared_after_the_most_views_at_which_every_way_was_looked_at():
    bench = benchmark("bench_less_work")
    first, second = list(bench.WAYS)[:2]
    speed = {"size": [{"name": first, "cpu_s": 3.0}, {"name": second, "cpu_s": 2.0}]}
    curves = {
        first: [{"views": v, "cpu_s": c, "loss": x} for v, c, x in ((70, 3, 1.3), (100, 6, 0.9), (210, 9, 0.7))],
        second: [
            {"views": v, "cpu_s": c, "loss": x}
            for v, c, x in ((60, 1, 2.0), (80, 2, 0.97), (100, 3, 0.95), (200, 7, 0.8), (250, 8, 0.5), (300, 9, 0.65))
        ],
    }
    rows = bench.rows_of(speed, curves)
    assert [row["times"]["size"] for row in rows] == [1.0, pytest.approx(1.5)]
    # Lowest, median and highest of the last quarter of nine seconds.
    assert [row["loss_after_time"] for row in rows] == [[0.7, 0.7, 0.7], [0.5, 0.65, 0.8]]
    # Both were looked at after 100 views, and later never after as many.
    assert [row["common_views"] for row in rows] == [100, 100]
    assert [row["loss_after_views"] for row in rows] == [[0.9, 0.9, 0.9], [0.95, 0.96, 0.97]]
