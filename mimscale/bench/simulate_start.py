"""What a start of thousands of ranks on hundreds of thousands of volumes does once, in one process.

Planning the run, judging what the ranks say of themselves, opening the store. The ranks and the rows of the store are
made up; what looks at them is what a run calls.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mimscale.bench.estimate import Assumptions, Cluster, estimate
from mimscale.bench.gpus import GPUS
from mimscale.bench.simulate import GPUS_A_NODE, MICRO_BATCH, VOLUMES_A_PACK, Scale
from mimscale.bench.verbs import bench_config
from mimscale.errors import LaunchError
from mimscale.store import layout
from mimscale.store.intensity import ChannelStats, IntensityContract
from mimscale.store.manifest import load_manifest, write_manifest
from mimscale.store.rows import VolumeRow
from mimscale.store.stage import STAGE_COLUMNS, packs_of
from mimscale.train.config import PretrainConfig
from mimscale.train.environment import installed_versions
from mimscale.train.preflight import RankFacts, judge
from mimscale.train.rank_times import RankTimes, slow_rank, time_metrics
from mimscale.train.size import checkpoint_bytes
from mimscale.train.training_data import TrainingData

RECIPE = "pretrain_mae_vit_b"
GPU = "h100"
_SLOW_RANK_FACTOR = 1.5


@contextmanager
def store_of(volumes: int) -> Iterator[Path]:
    """A store of so many volumes without their voxels: `store.json` and a manifest whose ids all differ."""
    with tempfile.TemporaryDirectory(prefix="mimscale_simulate_") as name:
        store = Path(name)
        info = layout.StoreInfo(
            chunk_voxels=32,
            codec="fast",
            intensity=IntensityContract(),
            modality="ct",
            num_parts=-(-volumes // VOLUMES_A_PACK),
            ingest={},
            ingest_hash="0" * 16,
            subject_key_fingerprint="0" * 16,
            overlays={},
        )
        layout.write_info(store, info)
        write_manifest(store, [_row()])
        numbers = np.arange(volumes)
        table = load_manifest(store)._table.take(pa.array(np.zeros(volumes, np.int64)))
        columns = {
            "id": [f"{number:016x}" for number in numbers],
            "subject": [f"{number // 2:016x}" for number in numbers],
            "part": numbers // VOLUMES_A_PACK,
            "offset_bytes": numbers % VOLUMES_A_PACK * 10_000_000,
        }
        for column, values in columns.items():
            place = table.schema.get_field_index(column)
            field = table.schema.field(column)
            table = table.set_column(place, field, pa.array(values, field.type))
        pq.write_table(table, layout.manifest_path(store), compression="zstd", row_group_size=32_768)
        yield store


def _row() -> VolumeRow:
    affine = tuple(map(float, np.diag([1.0, 1.0, 1.5, 1.0]).flatten()))
    return VolumeRow(
        id="0" * 16,
        subject="0" * 16,
        dataset="made up",
        licence="none",
        modality="ct",
        split="train",
        shape=(1, 200, 300, 300),
        spacing_mm=(1.5, 1.0, 1.0),
        affine=affine,
        dtype="int16",
        part=0,
        offset_bytes=0,
        length_bytes=9_876_543,
        fill_value=-1024.0,
        sha256="0" * 64,
        voxels_sha256="1" * 64,
        source_sha256="2" * 64,
        source_orientation="RAS",
        source_affine=affine,
        source_shape=(300, 300, 200),
        stats=(
            ChannelStats(
                p0_5=-1000.0, p50=0.0, p99_5=800.0, mean=-300.0, std=480.0, foreground_mean=60.0, foreground_std=140.0
            ),
        ),
        foreground_box=((3, 190), (10, 280), (20, 290)),
        overlays={},
    )


def _everyone(ranks: int, versions: dict[str, str | None], wrong: dict[str, Any]) -> list[RankFacts]:
    """What each rank says of itself, as it is unpacked on rank 0; `wrong` is what all but the first say instead."""
    everyone = []
    for rank in range(ranks):
        facts = RankFacts(
            rank=rank,
            node=_node_of(rank),
            local_size=min(GPUS_A_NODE, ranks),
            config_hash="0" * 16,
            versions=dict(versions),
            accelerator="cuda",
            devices=GPUS_A_NODE,
            store_problem=None,
            sees_run_dir=True,
            free_bytes=10**15,
        )
        everyone.append(replace(facts, **wrong) if rank and wrong else facts)
    return everyone


def _node_of(rank: int) -> str:
    return f"node{rank // GPUS_A_NODE:05d}"


def _judge(config: PretrainConfig, ranks: int, versions: dict[str, str | None]) -> None:
    judge(_everyone(ranks, versions, {}), ranks, config, checkpoint_bytes(config))


def _judge_bad(config: PretrainConfig, ranks: int, versions: dict[str, str | None]) -> None:
    """Everything is wrong with every rank but the first."""
    wrong = {
        "config_hash": "1" * 16,
        "versions": dict.fromkeys(versions, "0"),
        "accelerator": "cpu",
        "devices": 0,
        "store_problem": "no store.json",
        "sees_run_dir": False,
        "free_bytes": 0,
    }
    everyone = _everyone(ranks, versions, wrong)
    with suppress(LaunchError):
        judge(everyone, ranks + 1, config, checkpoint_bytes(config))


def _compare_times(ranks: int) -> None:
    times = [RankTimes(rank, _node_of(rank), 1.0, 0.1, 0.3) for rank in range(ranks)]
    slow_rank(times, _SLOW_RANK_FACTOR)
    time_metrics(times)


def _open_store(config: PretrainConfig) -> TrainingData:
    data = TrainingData(config, overlay=None)
    data.contract(step=1, precision="bf16")
    return data


def parts(scale: Scale, store: Path) -> dict[str, Callable[[], object]]:
    """The parts of a start that grow with ranks or volumes, ready to be timed."""
    batch = [f"micro_batch={MICRO_BATCH}", f"global_batch={scale.ranks * MICRO_BATCH}"]
    config = bench_config([RECIPE, f"store={store}", *batch])
    local = min(GPUS_A_NODE, scale.ranks)
    cluster = Cluster(gpu_name=GPU, gpu=GPUS[GPU], nodes=scale.ranks // local, gpus_per_node=local)
    versions = installed_versions()
    return {
        "`mimscale plan`, legal nodes": lambda: estimate(config, cluster, Assumptions()),
        "preflight: judging the ranks": lambda: _judge(config, scale.ranks, versions),
        "preflight, all ranks wrong": lambda: _judge_bad(config, scale.ranks, versions),
        "comparing the ranks' times": lambda: _compare_times(scale.ranks),
        "the store, opened to train on": lambda: _open_store(config),
        "its packs, to be copied": lambda: packs_of(store, load_manifest(store, STAGE_COLUMNS)),
    }
