"""A run goes on whatever number of ranks and ZeRO stage it is given next."""

import json
import os
from pathlib import Path

import pytest
import torch
from rank_pool import run_ranks
from safetensors.torch import load_file, save_file
from stream_stores import write_store
from tiny_runs import SHAPES, pretrain_words

from mimscale.train.run_dir import RunDir
from mimscale.train.state import KINDS, SavedState

pytestmark = pytest.mark.two_process
# drop_path is seeded by rank, so it is off where runs of different sizes are compared.
ELASTIC = (
    "global_batch=12",
    "micro_batch=1",
    "validation.every_steps=0",
    "model={dim: 24, depth: 2, heads: 2, drop_path: 0.0}",
)
CHAIN = ((1, 1, 3), (2, 1, 7), (4, 3, 11), (3, 2, 15), (1, 0, -1))  # ranks, ZeRO stage, the step of its signal


def losses(run: RunDir) -> torch.Tensor:
    lines = [line for line in run.read_metrics() if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 21))
    return torch.tensor([line["loss"] for line in lines], dtype=torch.float64)


def samples_by_step(run: RunDir) -> dict[int, list[int]]:
    """Step -> what all ranks together trained on."""
    found: dict[int, list[int]] = {}
    for path in run.samples.iterdir():
        for text in path.read_text().splitlines():
            line = json.loads(text)
            found.setdefault(line["step"], []).extend(line["sample_ids"])
    return {step: sorted(ids) for step, ids in found.items()}


def test_a_run_on_1_2_4_3_and_1_ranks_repeats_the_order_and_the_losses_of_a_straight_one(tmp_path):
    write_store(tmp_path / "store", SHAPES)
    straight, chained = RunDir(tmp_path / "straight"), RunDir(tmp_path / "chained")
    (ended,) = run_ranks(pretrain_words(tmp_path / "store", straight.path, *ELASTIC), size=1)
    assert ended.code == 0, ended.err
    heard = ""
    for size, stage, signal_step in CHAIN:
        words = pretrain_words(tmp_path / "store", chained.path, *ELASTIC, f"engine.zero_stage={stage}")
        ranks = run_ranks(words, size=size, signal_rank=0, signal_step=signal_step)
        assert [rank.code for rank in ranks] == [75 if signal_step > 0 else 0] * size, ranks[0].err
        heard += ranks[0].err
    assert "step_00000004: ranks 1 -> 2\n" in heard
    assert "step_00000012: ranks 4 -> 3, ZeRO stage 3 -> 2\n" in heard
    assert samples_by_step(chained) == samples_by_step(straight)
    # Another number of ranks sums gradients in another order: fp32 rounding over 20 steps, nothing more.
    torch.testing.assert_close(losses(chained), losses(straight), rtol=1e-5, atol=0)


# Each stage hands its state to every other one; then bf16, whose master weights are fp32 too.
HANDED_ON = [(stage, "fp32") for stage in (0, 1, 0, 2, 0, 3, 1, 2, 1, 3, 2, 3, 0)] + [
    (1, "bf16"),
    (2, "bf16"),
    (3, "bf16"),
    (1, "fp32"),
]


def change_stages(words: list[str]) -> int:
    """Let engines take over the state of the one before: load it, save it again, train on, save that."""
    from mimscale.config import load_config
    from mimscale.train.build import build_pretrain
    from mimscale.train.config import PretrainConfig
    from mimscale.train.engine import Engine, join_ranks, leave_ranks
    from mimscale.world import World

    ranks = join_ranks(World.from_environment(os.environ))
    root, words = Path(words[-1]), words[2:-1]

    def engine_of(stage: int, precision: str) -> Engine:
        more = (f"engine.zero_stage={stage}", f"engine.precision={precision}", "engine.bucket_elements=2000")
        config = load_config(PretrainConfig, "demo/pretrain", [*words, *more])
        return Engine(build_pretrain(config, channels=1), config, ranks)

    def save(engine: Engine, folder: Path) -> dict[str, int]:
        folder.mkdir(parents=True, exist_ok=True)
        part = engine.snapshot()
        part.write(folder)
        parts = ranks.gather(part.index())
        if ranks.is_first:
            engine.write_index(folder, parts)
            save_file(part.full_weights, folder / "full.safetensors")
        ranks.gather(None)  # the next one writes into the same memory
        return {name: values.data_ptr() for name, values in part.full_weights.items()}

    def train(engine: Engine) -> None:
        generator = torch.Generator().manual_seed(ranks.world.rank)
        engine.set_learning_rate(1)
        for _ in range(2):
            image = torch.rand(2, 1, 16, 24, 32, generator=generator)
            hidden = torch.arange(48).repeat(2, 1) % 4 > 0
            engine.backward(engine(image.bfloat16() if engine.precision == "bf16" else image, hidden).loss)
            engine.step()

    for number, kind in enumerate(HANDED_ON):
        engine = engine_of(*kind)
        if number:
            before = root / f"{number - 1}-trained"
            engine.load(before, [path.name for path in before.iterdir()])
            places = save(engine, root / f"{number}-taken-over")
        train(engine)
        places_then = save(engine, root / f"{number}-trained")
        assert number == 0 or places_then == places
    leave_ranks()
    return 0


def whole_state(folder: Path) -> dict[str, torch.Tensor]:
    saved = SavedState(folder, [path.name for path in folder.iterdir()])
    shapes = json.loads((folder / "state.json").read_text())["shapes"]
    return {f"{kind} {name}": saved.full(name, kind) for name in shapes for kind in KINDS}


def test_every_stage_and_precision_takes_over_the_state_of_every_other_bit_by_bit(tmp_path):
    words = pretrain_words(tmp_path / "store", tmp_path / "run", *ELASTIC[3:], str(tmp_path / "states"))
    (tmp_path / "states").mkdir()
    ended = run_ranks(words, body=change_stages)
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    for number in range(1, len(HANDED_ON)):
        before, after = (tmp_path / "states" / f"{at}" for at in (f"{number - 1}-trained", f"{number}-taken-over"))
        given, taken = whole_state(before), whole_state(after)
        change = f"{HANDED_ON[number - 1]} -> {HANDED_ON[number]}"
        assert any(values.abs().sum() > 0 for name, values in given.items() if name.startswith("exp_avg_sq ")), change
        assert all(torch.equal(taken[name], values) for name, values in given.items()), change
        # AdamW's bias correction goes on where it stood.
        assert json.loads((after / "state.json").read_text())["adam_steps"] == number, change
        trained = whole_state(tmp_path / "states" / f"{number}-trained")
        assert not torch.equal(trained["weights encoder.norm.bias"], taken["weights encoder.norm.bias"]), change
        for state, folder in ((taken, after), (trained, tmp_path / "states" / f"{number}-trained")):
            weights = load_file(folder / "full.safetensors")
            assert all(torch.equal(state[f"weights {name}"], values) for name, values in weights.items()), change
            assert len(state) == 3 * len(weights)
