"""What the objectives of pretraining hand to their networks."""

import copy
import hashlib

import numpy as np
import pytest
import torch

from mimscale.config import apply_override, build_config
from mimscale.errors import ConfigError
from mimscale.models.patches import hidden_voxels
from mimscale.stream.batch import Batch
from mimscale.train.config import PretrainConfig, accumulation
from mimscale.train.contrast import Contrast
from mimscale.train.pretrain import MaskedReconstruction, pretrain_objective
from mimscale.train.verbs import check_run

COMMON = {
    "store": "store",
    "run_dir": "run",
    "steps": 1,
    "global_batch": 4,
    "micro_batch": 4,
    "crop_voxels": [8, 8, 8],
    "patch_voxels": [4, 4, 4],
    "model": {"dim": 24, "depth": 1, "heads": 2},
    "mae": {"decoder_dim": 24, "decoder_depth": 1, "decoder_heads": 2},
    "simclr": {"projection_dim": 6, "hidden_dim": 12},
}
STRONG = {"flip_prob": [0.5, 0.5, 0.5], "scale_prob": 1, "scale_by": 0.5, "noise_prob": 1}


def config_with(**changes) -> PretrainConfig:
    return build_config(PretrainConfig, COMMON | changes, "test")


def a_batch(count=4, subjects=None, counted=None) -> Batch:
    rng = np.random.default_rng(0)
    return Batch(
        volume=torch.from_numpy(rng.integers(0, 1000, (count, 1, 8, 8, 8)).astype(np.int16)),
        label=torch.from_numpy((rng.random((count, 8, 8, 8)) < 0.3).astype(np.uint8)),
        sample_ids=torch.arange(count),
        seeds=[int.from_bytes(hashlib.sha256(bytes([i])).digest()[:8], "big") for i in range(count)],
        spacing_mm=[(1.0, 1.0, 1.0)] * count,
        normalisation=torch.tensor([[[0.0, 1000.0, 0.0, 0.001]]] * count),
        inside=torch.tensor([[[0, 8]] * 3] * count, dtype=torch.int32),
        volume_ids=[str(i) for i in range(count)],
        subjects=subjects or [str(i) for i in range(count)],
        counted=torch.ones(count, dtype=torch.bool) if counted is None else counted,
    )


def part_of(batch: Batch, rows: slice) -> Batch:
    lists = ("seeds", "spacing_mm", "volume_ids", "subjects")
    fields = {name: value[rows] for name, value in batch.tensors().items()}
    fields |= {name: getattr(batch, name)[rows] for name in lists} | {"sample_ids": batch.sample_ids[rows]}
    return Batch(**fields)


class Asked:
    """A forward that remembers what it was given."""

    def __init__(self, model):
        self.model, self.inputs = model, []

    def __call__(self, *inputs):
        self.inputs.append(inputs)
        return self.model(*inputs)


def built(config: PretrainConfig):
    torch.manual_seed(0)
    objective = pretrain_objective(config)
    return objective, Asked(objective.build(1))


def test_a_method_has_its_objective():
    assert isinstance(pretrain_objective(config_with(method="mae")), MaskedReconstruction)
    assert isinstance(pretrain_objective(config_with(method="simmim")), MaskedReconstruction)
    assert isinstance(pretrain_objective(config_with(method="simclr")), Contrast)


@pytest.mark.parametrize("method", ["mae", "simmim"])
def test_repeats_show_each_decoded_crop_under_other_masks_and_augmentations(method):
    config = config_with(method=method, mask={"repeats": 3, "ratio": 0.5}, augment=STRONG)
    objective, forward = built(config)
    loss = objective.loss(forward, a_batch())
    image, hidden, _ = forward.inputs[0]
    assert image.shape == (12, 1, 8, 8, 8)
    assert len({row.numpy().tobytes() for row in hidden[0::4]}) > 1
    assert not torch.equal(image[:4], image[4:8])
    once, forward_once = built(config_with(method=method, mask={"ratio": 0.5}, augment=STRONG))
    first = once.loss(forward_once, a_batch())
    assert torch.equal(forward_once.inputs[0][0], image[:4])  # the first repeat is what one mask alone would give
    assert torch.equal(forward_once.inputs[0][1], hidden[:4])
    others = [forward.model(image[rows], hidden[rows]).loss for rows in (slice(4, 8), slice(8, 12))]
    torch.testing.assert_close(loss, (first + sum(others)) / 3)


def test_voxels_of_an_exclusion_overlay_are_no_target_in_training_and_validation():
    config = config_with(exclude_overlay="face")
    objective, forward = built(config)
    assert objective.overlay == "face"
    batch = a_batch()
    losses = [objective.loss(forward, batch), objective.validation_sums(forward, batch)["loss"]]
    _, hidden, valid = forward.inputs[0]
    assert torch.equal(valid[:, 0], batch.label == 0)
    unseen = (batch.label != 0)[:, None] & hidden_voxels(hidden, (4, 4, 4), (2, 2, 2))
    batch.volume[unseen] = 999
    changed = [objective.loss(forward, batch), objective.validation_sums(forward, batch)["loss"]]
    assert losses == changed


def test_only_a_share_of_the_hidden_patches_is_predicted_when_asked():
    objective, forward = built(config_with(mask={"predicted_share": 0.5}))
    objective.loss(forward, a_batch())
    hidden, predicted = forward.inputs[0][1], forward.inputs[0][3]
    assert hidden.sum(dim=1).tolist() == [6] * 4
    assert predicted.sum(dim=1).tolist() == [3] * 4
    objective.validation_sums(forward, a_batch())
    assert len(forward.inputs[1]) == 3  # validation predicts all of them


def test_simclr_sees_two_views_of_each_crop_and_the_same_ones_in_each_validation():
    objective, forward = built(config_with(method="simclr", augment=STRONG))
    batch = a_batch()
    objective.loss(forward, batch)
    (views,) = forward.inputs[0]
    assert views.shape == (8, 1, 8, 8, 8)
    assert all(not torch.equal(views[i], views[4 + i]) for i in range(4))
    sums = objective.validation_sums(forward, batch)
    assert sums == objective.validation_sums(forward, batch)


def test_simclrs_validation_does_not_depend_on_batches_and_shows_a_collapse():
    config = config_with(method="simclr", augment=STRONG)
    objective, forward = built(config)
    batch = a_batch()
    with torch.no_grad():
        whole = objective.validation_metrics(
            {name: float(value) for name, value in objective.validation_sums(forward, batch).items()}
        )
        parts = [objective.validation_sums(forward, part_of(batch, rows)) for rows in (slice(0, 3), slice(3, 4))]
        padded = a_batch(counted=torch.tensor([False, False, False, True]))
        parts[1] = objective.validation_sums(forward, padded)
        added = objective.validation_metrics({name: float(parts[0][name] + parts[1][name]) for name in parts[0]})
        views = forward.model(forward.inputs[0][0]).double()
        first, second = views.chunk(2)
        assert whole["val_cosine_views"] == pytest.approx(float((first * second).sum(dim=1).mean()))
        crops = first @ first.T
        assert whole["val_cosine_crops"] == pytest.approx(float((crops.sum() - crops.trace()) / 12), rel=1e-5)
        assert added == pytest.approx(whole, rel=1e-5)
        collapsed = objective.validation_sums(lambda image: torch.ones(len(image), 4) / 2, batch)
    metrics = objective.validation_metrics({name: float(value) for name, value in collapsed.items()})
    assert metrics == pytest.approx({"val_cosine_views": 1.0, "val_cosine_crops": 1.0})


def test_the_pool_of_simclr_may_not_depend_on_how_many_ranks_there_are():
    assert accumulation(config_with(method="simclr"), 1) == 1
    pool = {"pool_crops": 4, "projection_dim": 6, "hidden_dim": 12}
    assert accumulation(config_with(method="simclr", global_batch=8, micro_batch=2, simclr=pool), 2) == 2
    with pytest.raises(ConfigError, match=r"micro_batch=4 on 2 rank\(s\) computes 8 at once; set micro_batch=2, or"):
        accumulation(config_with(method="simclr", global_batch=8, simclr=pool), 2)
    assert accumulation(config_with(method="mae", global_batch=8, simclr=pool), 2) == 1


def test_simclr_without_augmentation_or_with_a_mask_of_the_loss_is_refused():
    with pytest.raises(ConfigError, match="two views of a crop would be the same"):
        check_run(config_with(method="simclr"))
    with pytest.raises(ConfigError, match="exclude_overlay=face: method=simclr predicts no voxels"):
        check_run(config_with(method="simclr", augment=STRONG, exclude_overlay="face"))
    check_run(config_with(method="simclr", augment=STRONG))


# Every choice of a recipe that is not its default: the method, and the key as a command line has it.
CHOICES = [
    ("mae", "patch_voxels=[2,4,4]"),
    ("mae", "mask.ratio=0.5"),
    ("mae", "mask.ratio_range=[0.2,0.4]"),
    ("mae", "mask.unit_voxels=[8,4,4]"),
    ("mae", "mask.style=block"),
    ("mae", "mask.style=grid"),
    ("mae", "mask.predicted_share=0.5"),
    ("mae", "mask.repeats=2"),
    ("mae", "exclude_overlay=face"),
    ("mae", "mae.decoder_depth=0"),
    ("mae", "mae.decoder_depth=2"),
    ("mae", "mae.decoder_dim=48"),
    ("mae", "mae.target=patch_normalised"),
    ("mae", "mae.loss=l2"),
    ("mae", "mae.loss_on=all"),
    ("mae", "model.positions=learned"),
    ("mae", "model.positions=rope"),
    ("mae", "model.positions=rope_learned"),
    ("mae", "model.mlp=swiglu"),
    ("mae", "model.layer_scale=0.1"),
    ("simmim", "mask.style=block"),
    ("simmim", "mask.predicted_share=0.5"),
    ("simmim", "simmim.head=mlp"),
    ("simmim", "simmim.target=patch_normalised"),
    ("simmim", "simmim.loss=l2"),
    ("simmim", "simmim.loss_on=all"),
    ("simclr", "simclr.temperature=0.5"),
    ("simclr", "simclr.projection_dim=12"),
    ("simclr", "simclr.hidden_dim=24"),
]


@pytest.mark.parametrize(("method", "choice"), CHOICES)
def test_every_choice_of_a_recipe_changes_the_loss_and_trains_every_weight(method, choice):
    augment = STRONG if method == "simclr" else {}
    losses = []
    for words in ((), (choice,)):
        tree = {**copy.deepcopy(COMMON), "method": method, "augment": augment}
        for word in words:
            apply_override(tree, word)
        objective, forward = built(build_config(PretrainConfig, tree, "test"))
        loss = objective.loss(forward, a_batch())
        loss.backward()
        without = [name for name, one in forward.model.named_parameters() if one.grad is None or not one.grad.any()]
        assert without == []
        losses.append(float(loss.detach()))
    assert np.isfinite(losses).all()
    assert losses[0] != losses[1]
