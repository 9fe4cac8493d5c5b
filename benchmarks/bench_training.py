"""Training in three modes and its scaling over ranks of this machine, on a store of synthetic CTs.

The bodies are `mimscale bench train` and `mimscale bench scaling`, which run on a store and a recipe of your own.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from ingest_volumes import Kind, synthetic_ct, write_files

from mimscale.bench import measure, scaling, training
from mimscale.bench.results import RESULT_FILE
from mimscale.bench.verbs import bench_config
from mimscale.config import build_config, config_tree
from mimscale.ingest.config import IngestConfig
from mimscale.ingest.run import ingest

VOLUMES = 16  # an epoch must hold the global batch of all ranks
SETTINGS = ["crop_voxels=[64,64,64]", "patch_voxels=[8,8,8]", "micro_batch=4", "global_batch=16", "engine.zero_stage=1"]
# Of a network of 3 million weights: with the recipes' buckets, stage 3 would hold little else.
BUCKETS = "engine.bucket_elements=1000000"
SMALL = ["model={dim: 192, depth: 6, heads: 6}", "mae={decoder_dim: 96, decoder_depth: 1, decoder_heads: 3}"]
STREAM = "stream={workers: 1, crops_per_volume: 4, region_voxels: [96,96,96], align_voxels: 32}"


def main() -> int:
    parser = measure.results_arguments("Benchmark of training and its scaling.")
    parser.add_argument("--steps", type=int, default=20, help="of a window")
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--memory-ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--threads", type=int, default=1, help="of a rank")
    parser.add_argument("--edge", type=int, default=192, help="of the CTs, voxels")
    arguments = parser.parse_args()
    surroundings = measure.surroundings()
    with tempfile.TemporaryDirectory(prefix="bench_training_") as name:
        folder = Path(name)
        store = synthetic_store(folder, arguments.edge)
        words = ["demo/pretrain", *SETTINGS, *SMALL, BUCKETS, STREAM, f"store={store}", "modality=null"]
        recipe = folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(_tree(words, folder / "run")))
        print("training in three modes ...", file=sys.stderr, flush=True)
        modes = [f"--steps={arguments.steps}", f"--windows={arguments.windows}"]
        scaling.run_ranks(["train", str(recipe), *modes], 1, arguments.threads)
        result = json.loads((folder / "run" / RESULT_FILE).read_text())
        result["config"] |= {"store": "synthetic", "run_dir": "none"}
        config = bench_config(words)
        tables = {
            "surroundings": surroundings,
            "config": {**config_tree(config), "store": "synthetic", "run_dir": "none"},
            "settings": {key: value for key, value in vars(arguments).items() if key != "out"},
            "threads": arguments.threads,
            "scaling": scaling.measure_scaling(
                config,
                sorted(arguments.ranks),
                steps=arguments.steps,
                windows=arguments.windows,
                threads=arguments.threads,
            ),
            "memory": scaling.measure_memory(config, arguments.memory_ranks, threads=arguments.threads),
        }
    head = f"on {surroundings['cpu']}, {surroundings['time'][:10]}, commit {surroundings['commit']}, load average "
    head += f"{surroundings['load_average']:.1f} at the start\n\n"
    own = {key: value for key, value in result.items() if key not in ("schema_version", "benchmark")}
    for benchmark, tree, text in (
        ("train", {**own, "surroundings": surroundings}, training.as_markdown(result)),
        ("scaling", tables, scaling.as_markdown(tables)),
    ):
        path = measure.write_result(
            arguments.out, benchmark, arguments.hardware, tree, f"# {benchmark.capitalize()} {head}{text}"
        )
        print(path.read_text())
    scaling.draw(tables, path.with_suffix(".png"))
    return 0


def _tree(words: list[str], run_dir: Path) -> dict[str, Any]:
    return {**config_tree(bench_config(words)), "run_dir": str(run_dir)}


def synthetic_store(folder: Path, edge: int) -> Path:
    """Shifted copies of a synthetic CT, as `mimscale ingest` stores them."""
    sources = folder / "sources"
    sources.mkdir()
    kind = Kind("ct", "ct", synthetic_ct((edge, edge, edge)), np.diag([-0.8, -0.8, 1.0, 1.0]))
    paths = write_files(kind, sources, VOLUMES, ".nii")
    tree = {"sources": paths, "out": str(folder / "store"), "modality": "ct", "codec": "fast", "workers": 1}
    summary = ingest(build_config(IngestConfig, {**tree, "val_fraction": 0.0, "parts": 1}, "benchmark"))
    assert summary["stored"] == VOLUMES, summary
    return folder / "store"


if __name__ == "__main__":
    raise SystemExit(main())
