"""Ranks that are killed and a run that goes on: the same bits as a run that nobody disturbed, whatever is switched on.

CI runs a cover of the switches in which any two settings meet; `make soak` runs the full product.
"""

import json
import re
import signal
from functools import partial
from itertools import combinations, product
from pathlib import Path

import planted_faults
import pytest
import torch
from pairwise import Case, full_product, pairwise_cover
from rank_pool import run_ranks
from safetensors.torch import load_file
from stream_stores import write_store
from tiny_runs import SHAPES

from mimscale.train import committed
from mimscale.train.run_dir import RunDir

pytestmark = pytest.mark.two_process

FACTORS = {
    "zero_stage": (0, 1, 2, 3),
    "precision": ("fp32", "bf16"),
    "accumulation": (1, 4),
    "checkpoint_activations": (False, True),
    "drop_path": (0.0, 0.5),
    "verb": ("pretrain", "finetune"),
}
STEPS, KILLED_AT = 5, 4
GLOBAL_BATCH, RANKS = 8, 2
NETWORKS = {
    "pretrain": "mae={decoder_dim: 24, decoder_depth: 1, decoder_heads: 2}",
    "finetune": "unetr={feature_size: 4, num_classes: 3}",
}
# Random as well, and of each sample: they must come back with it.
AUGMENT = "augment={flip_prob: [0.5, 0.5, 0.5], affine_prob: 0.7, rotate_deg: [15, 10, 10], noise_prob: 0.5}"


def is_allowed(case: Case) -> bool:
    """Stage 0 refuses bf16 (a test of the config shows it)."""
    return not (case["zero_stage"] == 0 and case["precision"] == "bf16")


PRODUCT = full_product(FACTORS, is_allowed)
COVER = pairwise_cover(PRODUCT)


def name_of(case: Case) -> str:
    named = (f"{name}={value}" if isinstance(value, int | float) else str(value) for name, value in case.items())
    return " ".join(named)


def test_any_two_settings_that_may_meet_meet_in_a_case_of_the_cover():
    for (one, its), (other, others) in combinations(FACTORS.items(), 2):
        for value, its_value in product(its, others):
            pair = {one: value, other: its_value}
            meets = [case for case in COVER if pair.items() <= case.items()]
            assert bool(meets) == (pair != {"zero_stage": 0, "precision": "bf16"}), pair
    assert len(PRODUCT) == 112
    assert all(case in PRODUCT for case in COVER)
    assert len(COVER) <= 16


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    write_store(folder, SHAPES)
    return folder


def words_of(case: Case, store: Path, run: RunDir, ranks: int, *more: str) -> list[str]:
    switches = f"drop_path: {case['drop_path']}, checkpoint_activations: {str(case['checkpoint_activations']).lower()}"
    return [
        case["verb"],
        f"demo/{case['verb']}",
        f"store={store}",
        f"run_dir={run.path}",
        f"steps={STEPS}",
        f"global_batch={GLOBAL_BATCH}",
        f"micro_batch={GLOBAL_BATCH // ranks // case['accumulation']}",
        "crop_voxels=[8, 16, 16]",
        "patch_voxels=[4, 8, 8]",
        f"model={{dim: 24, depth: 2, heads: 2, {switches}}}",
        NETWORKS[case["verb"]],
        AUGMENT,
        "optim.warmup_steps=2",
        f"engine={{zero_stage: {case['zero_stage']}, precision: {case['precision']}, bucket_elements: 2000}}",
        "stream={workers: 1, crops_per_volume: 2}",
        "checkpoint={every_steps: 1, keep: 2}",
        "meter={record_samples: true, tensorboard: false}",
        "validation.every_steps=0",
        *more,
    ]


def told(run: RunDir) -> dict[str, list[float]]:
    """What each step reported, in order."""
    lines = [line for line in run.read_metrics() if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return {name: [line[name] for line in lines] for name in ("loss", "grad_norm", "lr")}


def sample_ids(run: RunDir) -> dict[tuple[str, int], list[int]]:
    """(Rank, step) -> what it trained on, the same ids when a step was made again."""
    found: dict[tuple[str, int], list[int]] = {}
    for path in run.samples.iterdir():
        for text in path.read_text().splitlines():
            line = json.loads(text)
            assert found.setdefault((path.stem, line["step"]), line["sample_ids"]) == line["sample_ids"]
    return found


def last_state(run: RunDir) -> dict[str, bytes]:
    """Every file of the last checkpoint but those that tell the time: weights, both moments, the number of updates."""
    tag = run.checkpoints / committed.tag_name(STEPS)
    assert committed.why_not_loadable(tag) is None
    files = [*sorted(tag.glob("*.safetensors")), tag / "state.json"]
    return {path.name: path.read_bytes() for path in files}


def check_bits_after_a_kill(
    case: Case, store: Path, folder: Path, *more: str, ranks: int = RANKS, accelerator: str = "cpu"
) -> None:
    straight, killed = RunDir(folder / "straight"), RunDir(folder / "killed")
    run = partial(run_ranks, size=ranks, accelerator=accelerator)
    ended = run(words_of(case, store, straight, ranks, *more))
    assert [rank.code for rank in ended] == [0] * ranks, ended[0].err

    words = words_of(case, store, killed, ranks, *more)
    ended = run(words, plant=partial(planted_faults.killed_at, KILLED_AT))
    codes = {rank.code for rank in ended}
    # A rank may hear that the other one is gone before it dies itself.
    assert -signal.SIGKILL in codes, ended[0].err
    assert codes <= {-signal.SIGKILL, 6}, ended[0].err
    ended = run(words)
    assert [rank.code for rank in ended] == [0] * ranks, ended[0].err
    went_on = re.search(rf"continues at step (\d+) of {STEPS}", ended[0].err)
    assert went_on is not None, ended[0].err
    # The save before the last one was committed at the latest when the last one began.
    assert int(went_on[1]) >= KILLED_AT - 2

    assert told(killed) == told(straight)
    assert len(set(told(straight)["loss"])) == STEPS
    assert sample_ids(killed) == sample_ids(straight)
    states = last_state(killed), last_state(straight)
    assert len(states[0]) == ranks + 2
    assert states[0] == states[1]
    weight = load_file(straight.checkpoints / committed.tag_name(STEPS) / "weights.safetensors")[
        "encoder.projection.weight"
    ]
    assert weight.dtype == torch.float32
    if case["precision"] == "bf16":
        assert not torch.equal(weight, weight.bfloat16().float()), "the bf16 copy was saved, not the fp32 master"
    stalls = {
        line["step"]: line["checkpoint_stall_s"] for line in straight.read_metrics() if "checkpoint_stall_s" in line
    }
    assert stalls.keys() == set(range(1, STEPS + 1))
    assert all(0 < stall_s < 60 for stall_s in stalls.values())
    # What came before the first step of the run that went on, printed and recorded.
    split = json.loads((killed.path / "startup.json").read_text())
    spans = {"import_s", "init_s", "preflight_s", "build_s", "load_s", "first_batch_s", "first_step_s"}
    assert spans | {"total_s"} == split.keys()
    assert sum(split[name] for name in spans) == pytest.approx(split["total_s"], abs=0.1)
    assert re.search(r"first step after \d+\.\d s: import .* load \d", ended[0].err)


@pytest.mark.parametrize("case", COVER, ids=name_of)
def test_a_run_whose_ranks_are_killed_goes_on_to_the_bits_of_a_straight_one(case, store, tmp_path, survived):
    check_bits_after_a_kill(case, store, tmp_path)
    survived["kill of all ranks of a training run"] += 1


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", [case for case in PRODUCT if case not in COVER], ids=name_of)
def test_with_all_combinations_of_settings_too(case, store, tmp_path, survived):
    check_bits_after_a_kill(case, store, tmp_path)
    survived["kill of all ranks of a training run"] += 1


@pytest.mark.cuda
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", COVER, ids=name_of)
def test_with_deterministic_kernels_on_a_gpu_too(case, store, tmp_path):
    check_bits_after_a_kill(case, store, tmp_path, "engine.deterministic=true", ranks=1, accelerator="cuda")
