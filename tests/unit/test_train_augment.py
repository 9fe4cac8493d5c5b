"""Training samples are augmented, validation samples never."""

import numpy as np
import pytest
import torch

from mimscale.config import build_config, load_config
from mimscale.errors import ConfigError
from mimscale.models.reconstruction import ReconstructionOutput
from mimscale.stream.batch import Batch
from mimscale.stream.config import AugmentConfig
from mimscale.train.config import FinetuneConfig, PretrainConfig
from mimscale.train.finetune import Segmentation
from mimscale.train.pretrain import MaskedReconstruction

COMMON = {
    "store": "store",
    "run_dir": "run",
    "steps": 1,
    "global_batch": 2,
    "micro_batch": 2,
    "crop_voxels": [8, 8, 8],
    "patch_voxels": [4, 4, 4],
}
STRONG = {"flip_prob": [1, 1, 0], "rot90_prob": 1, "affine_prob": 1, "rotate_deg": [30, 30, 30], "noise_prob": 1}


def a_batch() -> Batch:
    rng = np.random.default_rng(0)
    return Batch(
        volume=torch.from_numpy(rng.integers(0, 1000, (2, 1, 8, 8, 8)).astype(np.int16)),
        label=torch.from_numpy(rng.integers(0, 3, (2, 8, 8, 8)).astype(np.uint8)),
        sample_ids=torch.arange(2),
        seeds=[11, 12],
        spacing_mm=[(1.0, 1.0, 1.0)] * 2,
        normalisation=torch.tensor([[[0.0, 1000.0, 0.0, 0.001]]] * 2),
        inside=torch.tensor([[[0, 8]] * 3] * 2, dtype=torch.int32),
        volume_ids=["a", "b"],
        counted=torch.ones(2, dtype=torch.bool),
    )


class Seen:
    """A model that remembers the images that it was shown."""

    def __init__(self) -> None:
        self.images: list[torch.Tensor] = []

    def segment(self, image):
        self.images.append(image)
        return torch.zeros(2, 3, 8, 8, 8, requires_grad=True)

    def reconstruct(self, image, hidden, valid):
        self.images.append(image)
        patches = hidden.shape[1]
        return ReconstructionOutput(
            loss=torch.zeros(()),
            sample_loss=torch.zeros(2),
            answers=torch.zeros(2, patches, image[0].numel() // patches),
            places=None,
            tokens=torch.zeros(2, 1, 4),
            mean_voxel_loss=torch.zeros(()),
            num_patches=patches,
        )


def test_finetuning_augments_training_and_not_validation():
    plain, augmented = Seen(), Seen()
    for seen, augment in ((plain, {}), (augmented, STRONG)):
        tree = {**COMMON, "unetr": {"num_classes": 3}, "augment": augment}
        objective = Segmentation(build_config(FinetuneConfig, tree, "test"))
        objective.loss(seen.segment, a_batch())
        objective.validation_sums(seen.segment, a_batch())
    assert not torch.equal(plain.images[0], augmented.images[0])
    assert torch.equal(plain.images[1], augmented.images[1])
    assert torch.equal(plain.images[0], plain.images[1])


def test_pretraining_augments_training_and_not_validation_and_nothing_by_default():
    plain, augmented = Seen(), Seen()
    for seen, augment in ((plain, {}), (augmented, STRONG)):
        objective = MaskedReconstruction(build_config(PretrainConfig, {**COMMON, "augment": augment}, "test"))
        objective.loss(seen.reconstruct, a_batch())
        objective.validation_sums(seen.reconstruct, a_batch())
    assert not torch.equal(plain.images[0], augmented.images[0])
    assert torch.equal(plain.images[1], augmented.images[1])
    assert torch.equal(plain.images[0], plain.images[1])


def test_the_packaged_pretraining_recipes_augment_nothing_and_finetune_unetr_mirrors_nothing():
    words = ["store=s", "run_dir=r"]
    assert load_config(PretrainConfig, "pretrain_mae_vit_b", words).augment == AugmentConfig()
    augment = load_config(FinetuneConfig, "finetune_unetr", words).augment
    assert augment.flip_prob == (0, 0, 0)  # left and right organs are different classes
    assert augment.affine_prob > 0


def test_a_quarter_turn_of_crops_that_are_not_square_is_refused_before_the_start():
    tree = {**COMMON, "crop_voxels": [8, 8, 16], "augment": {"rot90_prob": 0.5}}
    with pytest.raises(ConfigError, match=r"augment.rot90_prob=0.5: a quarter turn needs equal crop edges"):
        build_config(PretrainConfig, tree, "test")
