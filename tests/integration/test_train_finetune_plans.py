"""Fine-tuning by each plan: the head first, a resume inside each stage, a frozen encoder, a control arm."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rank_pool import run_ranks
from safetensors.torch import load_file
from stream_stores import write_store
from tiny_runs import SHAPES, pretrain_words

from mimscale.config import load_config, split_arguments
from mimscale.errors import DataError
from mimscale.models.transfer import save_weights
from mimscale.store.layout import read_info
from mimscale.train.build import build_pretrain, weights_contract
from mimscale.train.config import FinetuneConfig, PretrainConfig
from mimscale.train.finetune import Segmentation
from mimscale.train.optim import learning_rate
from mimscale.train.run_dir import RunDir
from mimscale.train.training_data import TrainingData

STEPS, HEAD_STEPS = 12, 6


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    write_store(folder, SHAPES)
    return folder


@pytest.fixture(scope="module")
def source(store, tmp_path_factory) -> Path:
    """A folder with the weights of an encoder."""
    folder = tmp_path_factory.mktemp("source") / "weights"
    words = split_arguments(pretrain_words(store, folder, "method=simmim")[2:])[1]
    config = load_config(PretrainConfig, "demo/pretrain", words)
    torch.manual_seed(5)
    contract = weights_contract(
        config,
        read_info(store),
        channels=1,
        step=1,
        precision="fp32",
        overlay=None,
        datasets=[],
        spacing_mm=(1.0, 1.0, 1.0),
    )
    save_weights(folder, build_pretrain(config, 1).state_dict(), contract)
    return folder


def finetune_words(store: Path, run_dir: Path, source: Path, *more: str) -> list[str]:
    return [
        "finetune",
        "demo/finetune",
        f"store={store}",
        f"run_dir={run_dir}",
        f"init_from={source}",
        f"steps={STEPS}",
        "global_batch=2",
        "micro_batch=1",
        "crop_voxels=[16, 24, 32]",
        "patch_voxels=[4, 8, 8]",
        "model={dim: 24, depth: 2, heads: 2}",
        "unetr={feature_size: 4, num_classes: 3}",
        "stream={workers: 0}",
        "meter={tensorboard: false}",
        "validation={every_steps: 6}",
        "checkpoint={every_steps: 6, keep: 5}",
        *more,
    ]


def config_of(words: list[str]) -> FinetuneConfig:
    return load_config(FinetuneConfig, words[1], words[2:])


def encoder(file: Path) -> dict[str, torch.Tensor]:
    return {name: value for name, value in load_file(file).items() if name.startswith("encoder.")}


def weights_file(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}" / "weights.safetensors"


def train_straight_and_stopped(store, source, folder, stops, *more: str) -> tuple[Path, Path]:
    """A run without a break, and one of the same plan that is stopped after each of `stops`: to the same bits."""
    straight, stopped = folder / "straight", folder / "stopped"
    ended = run_ranks(finetune_words(store, straight, source, *more), size=1)
    assert ended[0].code == 0, ended[0].err
    codes = []
    for step in (*stops, -1):
        ended = run_ranks(finetune_words(store, stopped, source, *more), size=1, signal_rank=0, signal_step=step)
        codes.append(ended[0].code)
    assert codes == [*(75 for _ in stops), 0], ended[0].err
    lines = [[line for line in RunDir(run).read_metrics() if "loss" in line] for run in (straight, stopped)]
    for name in ("loss", "lr", "grad_norm"):
        assert [line[name] for line in lines[0]] == [line[name] for line in lines[1]]
    config = config_of(finetune_words(store, straight, source, *more))
    rates = [learning_rate(config.optim, step, config.steps) for step in range(config.steps)]
    assert [line["lr"] for line in lines[0]] == pytest.approx(rates)
    last = [weights_file(run, config.steps).read_bytes() for run in (straight, stopped)]
    assert last[0] == last[1]
    return straight, stopped


def test_a_sawtooth_trains_the_head_first_and_resumes_to_the_same_bits_inside_each_stage(store, source, tmp_path):
    optim = f"optim={{lr: 1e-3, schedule: sawtooth, head_steps: {HEAD_STEPS}, warmup_steps: 2, layer_decay: 0.8}}"
    # Inside of the head's stage, and of the next one.
    straight, _ = train_straight_and_stopped(store, source, tmp_path, (2, 8), optim)
    start, at_boundary, end = (
        encoder(source / "weights.safetensors"),
        *(encoder(weights_file(straight, step)) for step in (HEAD_STEPS, STEPS)),
    )
    assert all(torch.equal(value, start[name]) for name, value in at_boundary.items())
    # All weights of the encoder move in the second stage.
    assert [name for name, value in end.items() if torch.equal(value, start[name])] == []


@pytest.mark.parametrize(
    ("optim", "stops"),
    [
        ("{schedule: full, lr: 1e-3, warmup_steps: 3}", (3,)),  # where the rise ends
        ("{schedule: low_peak, lr: 1e-2, warmup_steps: 3}", (1,)),  # in the rise
        ("{schedule: full, lr: 1e-3, warmup_steps: 2, layer_decay: 0.5}", (4,)),  # in the fall
    ],
    ids=["full", "low peak", "layer-wise decay"],
)
def test_schedules_that_train_all_weights_resume_to_the_same_bits_as_well(optim, stops, store, source, tmp_path):
    more = (f"optim={optim}", "steps=6", "validation.every_steps=0")
    straight, _ = train_straight_and_stopped(store, source, tmp_path, stops, *more)
    start, end = encoder(source / "weights.safetensors"), encoder(weights_file(straight, 6))
    assert not any(torch.equal(value, start[name]) for name, value in end.items())


@pytest.mark.two_process
def test_a_linear_probe_of_regions_leaves_a_frozen_encoder_as_it_is_at_zero_3(store, source, tmp_path):
    words = finetune_words(
        store,
        tmp_path / "run",
        source,
        "head=linear",
        "regions={some: [b, c], last: [c]}",
        "unetr={num_classes: 2}",
        "optim={lr: 1e-2, schedule: frozen}",
        "engine.zero_stage=3",
    )
    stopped = run_ranks(words, signal_rank=1, signal_step=8)
    assert [rank.code for rank in stopped] == [75, 75], stopped[0].err
    ended = run_ranks(words)
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    start = encoder(source / "weights.safetensors")
    saved = load_file(weights_file(tmp_path / "run", STEPS))
    assert {name for name in saved if not name.startswith("encoder.")} == {"head.weight", "head.bias"}
    assert all(torch.equal(saved[name], value) for name, value in start.items())
    early = load_file(weights_file(tmp_path / "run", 6))
    assert not torch.equal(early["head.weight"], saved["head.weight"])


def test_the_mean_dice_of_regions_leaves_none_out_as_none_is_background(store, source, tmp_path):
    sums = {"loss": 3.0, "samples": 2.0, "both_0": 1.0, "either_0": 4.0, "both_1": 2.0, "either_1": 4.0}
    regions = ("regions={x: [b, c], y: [c]}", "unetr={num_classes: 2}")
    words = finetune_words(store, tmp_path / "run", source, *regions)
    metrics = Segmentation(config_of(words)).validation_metrics(sums)
    assert metrics == {"val_loss": 1.5, "val_dice": 0.75, "val_dice_0": 0.5, "val_dice_1": 1.0}
    classes = finetune_words(store, tmp_path / "run", source, "unetr={num_classes: 2}")
    assert Segmentation(config_of(classes)).validation_metrics(sums)["val_dice"] == 1.0


def test_the_control_arm_keeps_the_embedding_and_draws_the_blocks_anew(store, source, tmp_path):
    config = config_of(finetune_words(store, tmp_path / "run", source, "init_blocks=random"))
    objective = Segmentation(config)
    torch.manual_seed(config.seed)
    model = objective.build(1)
    from_scratch = {name: value.clone() for name, value in model.state_dict().items()}
    ranks = SimpleNamespace(is_first=True, first_does=lambda action: action())
    objective.prepare(model, TrainingData(config, "label"), ranks)
    pretrained = encoder(source / "weights.safetensors")
    for name, value in model.state_dict().items():
        if name.startswith("encoder.projection"):
            assert torch.equal(value, pretrained[name])
        elif name.startswith("encoder."):
            assert torch.equal(value, from_scratch[name])
    assert not torch.equal(
        from_scratch["encoder.blocks.0.mlp.rise.weight"], pretrained["encoder.blocks.0.mlp.rise.weight"]
    )


def test_a_region_of_a_class_that_the_overlay_does_not_have_is_refused_by_name(store, source, tmp_path):
    words = finetune_words(store, tmp_path / "run", source, "regions={x: [b], y: [liver]}", "unetr={num_classes: 2}")
    objective = Segmentation(config_of(words))
    with pytest.raises(DataError, match=r"regions name liver; overlay 'label' has the classes a, b, c"):
        objective.prepare(objective.build(1), TrainingData(config_of(words), "label"), SimpleNamespace(is_first=True))
