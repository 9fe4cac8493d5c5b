"""The loss of targets against plain loops: values, gradients, and no trace of how a global batch is cut."""

import math
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from target_samples import ENCODERS, bright_rows, bright_store, target_words, targets_table

from mimscale import durable
from mimscale.config import config_tree, load_config
from mimscale.models.contract import CONTRACT_FILE, CONTRACT_VERSION
from mimscale.models.transfer import save_weights
from mimscale.stream.batch import Batch
from mimscale.stream.device import normalise
from mimscale.train.config import FinetuneConfig
from mimscale.train.target_losses import target_losses, tasks_of
from mimscale.train.target_prediction import TargetPrediction
from mimscale.train.training_data import TrainingData
from mimscale.world import World

MISSING = {"tone": {1: "", 6: "NA"}, "site": {1: "", 2: ""}, "age": {1: "", 3: "", 4: ""}}
BATCHES = range(4)  # an epoch has three


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return bright_store(tmp_path_factory.mktemp("bright") / "store")


def config_of(store: Path, folder: Path, *more: str, head: str = "targets", **cells) -> FinetuneConfig:
    table, crops = targets_table(folder, **cells), "stream.crops_per_volume=4"
    words = target_words(store, folder / "run", table, crops, *more, head=head)
    config = load_config(
        FinetuneConfig, words[1], [word.replace("drop_path: 0.2", "drop_path: 0.0") for word in words[2:]]
    )
    return config.network.resolved(config)


def begun(config: FinetuneConfig) -> tuple[TargetPrediction, TrainingData]:
    objective = config.network.objective(config)
    data = TrainingData(config, objective.overlay, objective.usable)
    objective.begin(data)
    return objective, data


def micro_batches(config: FinetuneConfig, data: TrainingData, size: int) -> dict[int, list[Batch]]:
    """Of all ranks, by global batch."""
    found: dict[int, list[Batch]] = {number: [] for number in BATCHES}
    for rank in range(size):
        with data.loader(World(rank=rank, size=size, local_rank=rank, local_size=size), 0) as loader:
            for number in found:
                found[number] += [next(loader) for _ in range(config.global_batch // config.micro_batch // size)]
    return found


def test_each_loss_is_that_of_plain_loops():
    generator = torch.Generator().manual_seed(0)
    outputs = 3 * torch.randn(5, 6, generator=generator, dtype=torch.float64).float()
    tasks = tasks_of([("sex", ("f", "m")), ("age", ()), ("site", ("A", "B", "C"))])
    values = torch.tensor([[0, 0.2, 2], [1, -3.0, 0], [0, 1.0, 1], [1, 0.0, 2], [0, 5.0, 0]])
    for regression in ("smooth_l1", "l2"):
        losses = target_losses(outputs, values, tasks, regression)
        for i in range(5):
            own = outputs[i].tolist()
            for task, of_class, logits in ((0, int(values[i, 0]), own[:2]), (2, int(values[i, 2]), own[3:])):
                expected = math.log(sum(math.exp(one) for one in logits)) - logits[of_class]
                assert losses[i, task].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)  # fp32
            error = abs(own[2] - values[i, 1].item())
            smooth = 0.5 * error**2 if error < 1 else error - 0.5
            assert losses[i, 1].item() == pytest.approx(smooth if regression == "smooth_l1" else error**2, rel=1e-5)


def plain_loss(config, model, rows, train, batches) -> torch.Tensor:
    """Of a global batch: sample by sample, target by target, from the lines of the table."""
    known = [rows[volume] for volume in train]
    ages = [float(row["age"]) for row in known if row["age"]]
    mean, deviation = statistics.fmean(ages), statistics.pstdev(ages)
    weights = {"tone": 1.0, "site": 0.5, "age": 3.0}
    classes = {"tone": ["bright", "dark"], "site": ["A", "B", "C"]}
    losses = {name: [] for name in weights}
    for batch in batches:
        for place, volume_id in enumerate(batch.volume_ids):
            outputs = model(normalise(batch)[0][place : place + 1])[0]
            row, parts = rows[int(volume_id[-3:])], {"tone": outputs[:2], "site": outputs[2:5], "age": outputs[5]}
            for name, own in parts.items():
                if row[name] in ("", "NA"):
                    continue
                if name == "age":
                    error = (own - (float(row["age"]) - mean) / deviation).abs()
                    losses[name].append(torch.where(error < 1, 0.5 * error**2, error - 0.5))
                    continue
                loss = -own.log_softmax(dim=0)[classes[name].index(row[name])]
                if config.targets.class_weights == "balanced":
                    there = [one[name] for one in known if one[name] not in ("", "NA")]
                    loss = loss * len(there) / (len(classes[name]) * there.count(row[name]))
                losses[name].append(loss)
    means = {name: torch.stack(each).mean() for name, each in losses.items() if each}
    return sum(weights[name] * loss for name, loss in means.items()) / sum(weights.values())


def gradients(model, loss) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters()])


@pytest.mark.parametrize("balanced", ["none", "balanced"])
def test_value_and_gradient_are_means_over_the_samples_that_have_a_target_however_the_batch_is_cut(
    store, tmp_path, balanced
):
    more = (f"targets.class_weights={balanced}", "targets.task_weights={age: 3, site: 0.5}", "targets.unlabelled=skip")
    config = config_of(store, tmp_path, *more, **MISSING)
    objective, data = begun(config)
    assert data.train.tolist() == [0, 2, 3, 4, 5, 6, 7]  # of vol_001 nothing is known
    torch.manual_seed(1)
    model = objective.build(1)
    rows = bright_rows(**MISSING)
    whole = micro_batches(config, data, 1)
    expected = {}
    for number in BATCHES:
        loss = plain_loss(config, model, rows, data.train.tolist(), whole[number])
        expected[number] = loss.item(), gradients(model, loss)
    for size, micro_batch in ((1, 8), (1, 2), (2, 2), (4, 1)):
        cut = replace(config, micro_batch=micro_batch)
        objective, data = begun(cut)
        parts = micro_batches(cut, data, size)
        for number in BATCHES:
            losses = [objective.loss(model, batch) for batch in parts[number]]
            loss = torch.stack(losses).mean()
            # Sums of fp32 in another order.
            assert loss.item() == pytest.approx(expected[number][0], rel=1e-5)
            torch.testing.assert_close(gradients(model, loss), expected[number][1], rtol=1e-3, atol=1e-5)


def test_a_batch_without_a_target_adds_nothing_to_its_loss_and_no_gradient(store, tmp_path):
    config = config_of(store, tmp_path, age=dict.fromkeys(range(2, 8), ""))  # two volumes alone have an age
    objective, data = begun(config)
    torch.manual_seed(1)
    model = objective.build(1)
    batch = micro_batches(config, data, 1)[0][0]
    for volume_id, has_age in (("vol_005", False), ("vol_001", True)):  # what a substitute may be
        loss = objective.loss(model, replace(batch, volume_ids=[volume_id] * len(batch.volume_ids)))
        gradients(model, loss)
        assert bool(model.head.weight.grad[5].any()) == has_age
        assert model.head.weight.grad[:5].any(dim=1).all()


def test_targets_are_standardised_by_training_subjects_alone(store, tmp_path):
    config = config_of(store, tmp_path, "stream.fold=0/4")
    objective, data = begun(config)
    ages = [20 + 5 * volume for volume in data.train.tolist()]
    assert len(ages) == len(data.train) == 6
    age = objective.contract()["targets"]["outputs"][2]
    assert age["mean"] == pytest.approx(statistics.fmean(ages))
    assert age["deviation"] == pytest.approx(statistics.pstdev(ages))
    tone = objective.contract()["targets"]["outputs"][0]
    assert tone["classes"] == ("bright", "dark")
    assert sum(tone["training_volumes"]) == 6


def test_a_run_that_goes_on_with_other_volumes_keeps_what_its_outputs_mean(store, tmp_path):
    config = config_of(store, tmp_path, "stream.fold=0/4")
    objective, _ = begun(config)
    contract = {"contract_version": CONTRACT_VERSION, **objective.contract()}
    durable.write_json(config.run_dir / "checkpoints" / "step_00000010" / CONTRACT_FILE, contract)
    grown, data = begun(config_of(store, tmp_path))
    assert len(data.train) == 8
    assert grown.contract() == objective.contract()
    age = contract["targets"]["outputs"][2]
    expected = [(20 + 5 * volume - age["mean"]) / age["deviation"] for volume in range(8)]
    batch = micro_batches(config, data, 1)[0][0]
    values, _ = grown._on_device(batch, torch.device("cpu"))
    assert values[:, 2].tolist() == pytest.approx([expected[int(one[-3:])] for one in batch.volume_ids])


@pytest.mark.parametrize("head", ENCODERS)
def test_a_run_starts_from_a_pretrained_encoder_and_the_shares_of_its_classes(store, tmp_path, head):
    config = config_of(store, tmp_path, f"init_from={tmp_path / 'source'}", "targets.class_weights=none", head=head)
    torch.manual_seed(5)
    source = config.network.build(config, 1)
    contract = {"model": config_tree(config.model), "patch_voxels": list(config.patch_voxels), "channels": 1}
    save_weights(tmp_path / "source", source.state_dict(), contract)
    objective, data = begun(config)
    torch.manual_seed(6)
    model = objective.build(1)
    objective.prepare(model, data, SimpleNamespace(is_first=False, first_does=lambda action: action()))
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(value, source.encoder.state_dict()[name])
    assert not torch.equal(model.head.weight, source.head.weight)
    tone, site, age = model.head.bias[:2], model.head.bias[2:5], model.head.bias[5]
    torch.testing.assert_close(tone.softmax(dim=0), torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(site.softmax(dim=0), torch.tensor([3.0, 3.0, 2.0]) / 8)
    assert age == 0
