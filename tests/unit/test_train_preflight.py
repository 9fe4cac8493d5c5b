"""What ranks compare before they train, what their start took, and the code that they leave with."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fault_injector import run_program

from mimscale.errors import LaunchError
from mimscale.train import startup
from mimscale.train.config import PretrainConfig
from mimscale.train.engine import join_ranks
from mimscale.train.preflight import RankFacts, judge, preflight
from mimscale.train.run_dir import Outcome, RunDir
from mimscale.train.session import exit_code_of_rank
from mimscale.train.startup import Startup
from mimscale.world import World

CONFIG = PretrainConfig(
    store=Path("/data/store"),
    run_dir=Path("/runs/a"),
    steps=1,
    global_batch=4,
    micro_batch=1,
    crop_voxels=(32, 32, 32),
    patch_voxels=(16, 16, 16),
)


def _facts(rank: int, node: str) -> RankFacts:
    return RankFacts(
        rank=rank,
        node=node,
        local_size=2,
        config_hash="aa",
        versions={"torch": "2.6", "deepspeed": "0.19"},
        accelerator="cuda",
        devices=2,
        store_problem=None,
        sees_run_dir=True,
        free_bytes=10**9,
    )


EVERYONE = [_facts(0, "n1"), _facts(1, "n1"), _facts(2, "n2"), _facts(3, "n2")]


def test_ranks_that_agree_may_start_up_to_the_last_byte_and_not_beyond() -> None:
    free_bytes = min(facts.free_bytes for facts in EVERYONE)
    judge(EVERYONE, len(EVERYONE), CONFIG, free_bytes)
    with pytest.raises(LaunchError, match="the disk is full"):
        judge(EVERYONE, len(EVERYONE), CONFIG, free_bytes + 1)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"config_hash": "bb"}, "rank 2 on n2: another config than rank 0's; start all ranks with the same command"),
        ({"versions": {"torch": "2.7", "deepspeed": "0.19"}}, "rank 2 on n2: torch 2.7, rank 0 has 2.6; use one"),
        ({"accelerator": "cpu"}, "rank 2 on n2: computes on cpu, rank 0 on cuda; set DS_ACCELERATOR"),
        ({"devices": 1}, "n2: 2 ranks, but each sees 1 GPU"),
        ({"store_problem": "no store.json"}, "n2: store=/data/store cannot be read there (no store.json); mount it"),
        ({"sees_run_dir": False}, "n2: run_dir=/runs/a is not the folder that n1 sees; name one on a shared disk"),
        (
            {"free_bytes": 10**5},
            "n2: the disk is full: 0.100 MB free at run_dir=/runs/a, a checkpoint takes about 1.000 MB; free",
        ),
    ],
)
def test_one_rank_that_differs_is_named_with_its_node_and_the_way_out(changes: dict[str, Any], text: str) -> None:
    everyone = [replace(facts, **changes) if facts.rank == 2 else facts for facts in EVERYONE]
    with pytest.raises(LaunchError) as error:
        judge(everyone, 4, CONFIG, 10**6)
    assert text in str(error.value)
    assert str(error.value).count("\n  ") == 1


def test_a_network_that_adds_wrongly_is_named() -> None:
    with pytest.raises(LaunchError, match="4 ranks add up to 3: the collective library is broken"):
        judge(EVERYONE, 3, CONFIG, 10**6)


class RanksWithoutGather:
    """What `preflight` may ask of the ranks: nothing that brings the facts of all ranks to all of them."""

    def __init__(self, rank: int, mark: Path) -> None:
        self.world = World(rank=rank, size=4, local_rank=rank, local_size=4, node="n1")
        self.device = torch.device("cpu")
        self.is_first = rank == 0
        self.judged = 0
        self._mark = mark

    def first_does(self, action: Callable[[], Any]) -> Any:
        self.judged += self.is_first
        return action() if self.is_first else self._mark

    def gather_to_first(self, item: RankFacts) -> list[RankFacts]:
        return [replace(item, rank=rank) for rank in range(4)] if self.is_first else []

    def sum(self, values: dict[str, float]) -> Any:
        return SimpleNamespace(wait=lambda: {name: 4 * value for name, value in values.items()})


def test_only_the_first_rank_gets_the_facts_of_all_and_judges_them(tmp_path: Path) -> None:
    config = replace(CONFIG, run_dir=tmp_path / "run")
    first = RanksWithoutGather(0, tmp_path)
    preflight(config, first)  # type: ignore[arg-type]
    assert first.judged == 2  # the file that all must see, and the judgement
    assert not config.run_dir.exists()
    preflight(config, RanksWithoutGather(3, tmp_path))  # type: ignore[arg-type]


def test_a_job_for_gpus_does_not_train_on_a_cpu_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    world = World(rank=1, size=2, node="n2", local_size=1)
    with pytest.raises(
        LaunchError, match=r"rank 1 on n2: DS_ACCELERATOR=cuda, but torch sees no CUDA device here; ask"
    ):
        join_ranks(world)


def test_a_start_is_split_and_its_parts_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([110.0, 111.0, 113.0, 117.0, 117.5, 118.0])
    monkeypatch.setattr(startup.time, "time", lambda: next(clock))
    marks = {"MIMSCALE_BATCH_UNIX_S": "100", "MIMSCALE_SRUN_UNIX_S": "103", "MIMSCALE_RANK_UNIX_S": "104.5"}
    start = Startup(marks)
    start.ends("init_s")
    start.ends("build_s")
    start.ends("load_s")
    batches = start.watched(iter("ab"))
    assert next(batches) == "a"
    assert next(batches) == "b"
    run = RunDir(tmp_path)
    start.first_step_is_done(run)
    start.first_step_is_done(run)  # only the first counts
    spans = json.loads((tmp_path / "startup.json").read_text())
    total = spans.pop("total_s")
    assert spans == {
        "unpack_s": 3.0,
        "launch_s": 1.5,
        "import_s": 5.5,
        "init_s": 1.0,
        "build_s": 2.0,
        "load_s": 4.0,
        "first_batch_s": 0.5,
        "first_step_s": 0.5,
    }
    assert total == pytest.approx(sum(spans.values()))


LOOK_FOR_MUON = """
from mimscale.train.engine import import_muon_without_compiler

import_muon_without_compiler()
import deepspeed.runtime.zero.muon.muon_optimizer
print("torch._inductor.compile_fx" in sys.modules)
"""


def test_an_engine_starts_without_importing_torchs_compiler() -> None:
    ended = run_program(LOOK_FOR_MUON)
    assert (ended.returncode, ended.stdout.splitlines()[-1:]) == (0, ["False"]), ended.stderr


def test_a_start_without_a_launcher_begins_with_the_process() -> None:
    spans = Startup({}).spans
    assert list(spans) == ["import_s"]
    assert 0 < spans["import_s"] < 3600


@pytest.mark.parametrize(
    ("size", "environment", "code"),
    [(4, {"SLURM_STEP_ID": "0"}, 0), (1, {"SLURM_STEP_ID": "0"}, 75), (4, {}, 75)],
)
def test_ranks_of_one_srun_leave_an_interrupted_run_with_0(size: int, environment: dict[str, str], code: int) -> None:
    world = World(size=size, local_size=size)
    interrupted = Outcome(outcome="interrupted", exit_code=75, step=3)
    assert exit_code_of_rank(interrupted, world, environment) == code
    assert exit_code_of_rank(Outcome(outcome="failed", exit_code=3, step=3), world, environment) == 3
