"""The benchmark of the planner's estimates, on sizes that take seconds: each part is estimated and measured."""

import json
import sys
from pathlib import Path

from benchmark_modules import benchmark
from rank_pool import run_ranks
from store_samples import make_store

CROP = ["crop_voxels=[16,16,16]", "patch_voxels=[8,8,8]", "model={dim: 48, depth: 2, heads: 4}"]
TINY = ["demo/pretrain", *CROP, "mae={decoder_dim: 24, decoder_depth: 1, decoder_heads: 2}"]


def bench_tiny(words):
    """In a process of its own: `bench_plan.py WORDS` on a small store and models that take moments.

    Peaks and saves are left out: test_train_memory.py and test_bench_checkpoint.py measure the same ones.
    """
    store, *words = words
    bench = benchmark("bench_plan")
    bench.QUICK_RECIPES, bench.QUICK_CASES = ("ViT-B/16",), {}
    bench._saves = lambda arguments: ([], {"write_mb_per_s": bench._write_mb_per_s(arguments.folder, 1)})
    bench.READ[:] = [*TINY, "modality=null", "micro_batch=4", "global_batch=4"]
    del bench.LOADER_MODES["four crops of a region"]
    bench.QUICK_STEPS.clear()
    bench.QUICK_STEPS |= {"first": (TINY, 2), "second": ([*TINY, "mask.ratio=0.5"], 4)}
    bench.synthetic_store = lambda folder, edge: Path(store)
    sys.argv = ["bench_plan.py", *words]
    return bench.main()


def test_every_part_of_a_plan_is_measured(tmp_path):
    store = make_store(tmp_path / "store", count=4, val_fraction=0.0)
    (ended,) = run_ranks([str(store), "--quick", f"--folder={tmp_path}", f"--out={tmp_path}"], size=1, body=bench_tiny)
    assert ended.code == 0, ended.err
    (path,) = tmp_path.glob("plan_unnamed_*.json")
    tree = json.loads(path.read_text())
    rows = {row["what"]: row for row in tree["rows"]}
    assert [row["name"] for row in rows.values()] == [*4 * ["ViT-B/16"], "random origins", "second"]
    assert [row["most_miss"] for row in rows.values()] == [0.0, 0.02, 0.02, 0.02, None, None]
    assert all(row["holds"] is not False and row["measured"] > 0 for row in rows.values())
    assert tree["assumed"]["write_mb_per_s"] > 0
    assert 0 < tree["assumed"]["of_peak"] < 1.5
    assert "| a core of the loader | random origins |" in path.with_suffix(".md").read_text()
