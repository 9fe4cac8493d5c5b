"""Two ways for a run to go on with another number of ranks: our ranges, and DeepSpeed's universal conversion.

    python benchmarks/checkpoint_universal.py --hardware my_cpu

Two ranks train one step of a MAE and save both ways; then one rank loads both ways. Time, disk and whether every bit of
weights and moments arrived.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from mimscale.bench import measure
from mimscale.bench.checkpoint import train_step
from mimscale.config import load_config
from mimscale.train.build import build_pretrain
from mimscale.train.config import PretrainConfig
from mimscale.train.engine import Engine, join_ranks, leave_ranks
from mimscale.train.state import KINDS, SavedState
from mimscale.world import World

MODEL = "model={dim: 384, depth: 12, heads: 6}"  # ViT-S


def disk_bytes(folder: Path) -> int:
    """What lies in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def engine_of(universal: bool) -> tuple[Engine, PretrainConfig]:
    """This rank's engine."""
    world = World.from_environment(os.environ)
    extra = ["engine.extra={checkpoint: {load_universal: true}}"] if universal else []
    words = ["store=none", "run_dir=none", "global_batch=2", "micro_batch=1", MODEL, *extra]
    config = load_config(PretrainConfig, "pretrain_mae_vit_b", words)
    ranks = join_ranks(world)
    torch.manual_seed(0)
    return Engine(build_pretrain(config, channels=1), config, ranks), config


def save_both(folder: Path) -> None:
    """Of every rank: one step, then both ways of saving."""
    engine, config = engine_of(universal=False)
    train_step(engine, config)
    seconds = {}
    for way in ("ranges", "deepspeed"):
        engine.ranks.gather(None)
        began_s = time.perf_counter()
        if way == "ranges":
            part = engine.snapshot()
            part.write(folder)
            parts = engine.ranks.gather(part.index())
            if engine.ranks.is_first:
                engine.write_index(folder, parts)
        else:
            info: dict[str, Any] = {"universal_checkpoint_info": {}, "iteration": 1}
            engine._deepspeed.save_checkpoint(str(folder / "ds"), tag="tag", client_state=info, save_latest=True)
        engine.ranks.gather(None)
        seconds[way] = time.perf_counter() - began_s
    if engine.ranks.is_first:
        (folder / "save.json").write_text(json.dumps(seconds))
    leave_ranks()


def load(folder: Path, way: str) -> None:
    """Of one rank: load, and write down what arrived."""
    engine, _ = engine_of(universal=way == "universal")
    files = [path.name for path in folder.glob("state-rank*")]
    began_s = time.perf_counter()
    if way == "ranges":
        engine.load(folder, files)
    else:
        engine._deepspeed.load_checkpoint(str(folder / "ds"), tag="tag_universal", load_lr_scheduler_states=False)
    load_s = time.perf_counter() - began_s
    truth, wrong = SavedState(folder, files), 0
    for piece in engine.pieces():
        for kind in KINDS:
            whole = truth.full(piece.name, kind).view(-1)
            wrong += int((whole[piece.start : piece.start + piece.elements] != piece.tensors[kind]).sum())
    (folder / f"{way}.json").write_text(json.dumps({"load_s": load_s, "wrong_elements": wrong}))
    leave_ranks()


def run_ranks(size: int, *words: str) -> None:
    """Run this file as `size` ranks."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 9000), "DS_ACCELERATOR": "cpu"}
    started = []
    for rank in range(size):
        mine = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        environment = {**os.environ, **place, **mine, "OMP_NUM_THREADS": "1"}
        started.append(subprocess.Popen([sys.executable, __file__, *words], env=environment))
    if any(process.wait() for process in started):
        raise SystemExit(f"a rank of {words} failed")


def convert(folder: Path) -> float:
    """DeepSpeed's own converter, with as many workers as there are cores; returns its seconds."""
    workers = str(os.cpu_count())
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(folder / "ds/tag")]
    command += ["--output_folder", str(folder / "ds/tag_universal")]
    command += ["--num_extract_workers", workers, "--num_merge_workers", workers]
    began_s = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "DS_ACCELERATOR": "cpu"})
    return time.perf_counter() - began_s


def main() -> None:
    """Measure and write the result."""
    arguments = measure.results_arguments(__doc__ or "").parse_args()
    rows, results = [], []
    for _ in range(arguments.repeats):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            run_ranks(2, "save", name)
            ours = disk_bytes(folder) - disk_bytes(folder / "ds")
            theirs = disk_bytes(folder / "ds")
            convert_s = convert(folder)
            for way in ("ranges", "universal"):
                run_ranks(1, "load", name, way)
            saved = json.loads((folder / "save.json").read_text())
            loaded = {way: json.loads((folder / f"{way}.json").read_text()) for way in ("ranges", "universal")}
            results.append(
                {
                    "ranges": {"save_s": saved["ranges"], "convert_s": 0.0, "disk_bytes": ours, **loaded["ranges"]},
                    "universal": {
                        "save_s": saved["deepspeed"],
                        "convert_s": convert_s,
                        "disk_bytes": disk_bytes(folder / "ds"),
                        "disk_bytes_before": theirs,
                        **loaded["universal"],
                    },
                }
            )
    for way in ("ranges", "universal"):
        middle = {key: sorted(result[way][key] for result in results)[len(results) // 2] for key in results[0][way]}
        seconds = [f"{middle[key]:.2f}" for key in ("save_s", "convert_s", "load_s")]
        rows.append([way, *seconds, f"{middle['disk_bytes'] / 1e6:.0f}", middle["wrong_elements"]])
    text = measure.table(["way", "save s", "convert s", "load s", "disk MB", "elements that differ"], rows)
    tree = {"surroundings": measure.surroundings(), "model": MODEL, "ranks": [2, 1], "results": results}
    print(measure.write_result(arguments.out, "checkpoint_universal", arguments.hardware, tree, text))
    print(text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["save"]:
        save_both(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["load"]:
        load(Path(sys.argv[2]), sys.argv[3])
    else:
        main()
