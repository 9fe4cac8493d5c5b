import math

import pytest
import torch
from monai.losses import DiceCELoss, DiceLoss

from mimscale.models.prior import set_region_prior
from mimscale.train.finetune import classes_of_region
from mimscale.train.losses import (
    dice_binary_cross_entropy,
    dice_cross_entropy,
    overlap_counts,
    region_overlap_counts,
    region_target,
)


def random_case(seed=0, classes=3):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((2, classes, 4, 5, 6), generator=generator)
    label = torch.randint(0, classes, (2, 4, 5, 6), generator=generator)
    return logits, label


def test_it_equals_monais_dice_ce_where_no_voxel_is_ignored():
    logits, label = random_case()
    reference = DiceCELoss(to_onehot_y=True, softmax=True, smooth_nr=1e-5, smooth_dr=1e-5)(logits, label.unsqueeze(1))
    # Same sums in another order, fp32.
    torch.testing.assert_close(dice_cross_entropy(logits, label), reference, rtol=1e-5, atol=1e-6)


def test_ignored_voxels_change_neither_loss_nor_gradient():
    logits, label = random_case()
    label[0, :2] = 255
    changed = logits.clone()
    changed[0, :, :2] += 7.0
    assert dice_cross_entropy(logits, label) == dice_cross_entropy(changed, label)
    logits.requires_grad_()
    dice_cross_entropy(logits, label).backward()
    assert logits.grad[0, :, :2].abs().max() == 0
    assert logits.grad[0, :, 2:].abs().min() > 0


def test_the_loss_of_a_batch_is_the_mean_of_its_samples():
    logits, label = random_case()
    label[1, :, :3] = 255
    alone = [dice_cross_entropy(logits[i : i + 1], label[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(dice_cross_entropy(logits, label), sum(alone) / 2)


def test_overlaps_equal_a_loop():
    logits, label = random_case()
    label[0, 0] = 255
    both, either = overlap_counts(logits, label)
    predicted = logits.argmax(1)
    for class_index in range(3):
        counted = label != 255
        in_both = sum(
            1
            for p, t, c in zip(predicted.ravel(), label.ravel(), counted.ravel(), strict=True)
            if c and p == t == class_index
        )
        in_either = sum(
            int(p == class_index) + int(t == class_index)
            for p, t, c in zip(predicted.ravel(), label.ravel(), counted.ravel(), strict=True)
            if c
        )
        assert (both[class_index], either[class_index]) == (in_both, in_either)


# As BraTS has them: tumour core, whole tumour, enhancing tumour, each inside of another.
NAMES = ["background", "necrosis", "oedema", "enhancing"]
REGIONS = {"TC": ["necrosis", "enhancing"], "WT": ["necrosis", "oedema", "enhancing"], "ET": ["enhancing"]}
MEMBERS = classes_of_region(REGIONS, NAMES)


def a_region_case():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn((2, 3, 4, 5, 6), generator=generator)
    return logits, torch.randint(0, 4, (2, 4, 5, 6), generator=generator).to(torch.uint8)


def test_the_loss_of_regions_equals_monais_sigmoid_dice_and_torchs_binary_cross_entropy():
    logits, label = a_region_case()
    target = torch.stack([(label == 1) | (label == 3), label > 0, label == 3], dim=1)
    assert torch.equal(region_target(label, MEMBERS)[0], target)
    dice = DiceLoss(sigmoid=True, smooth_nr=1e-5, smooth_dr=1e-5)(logits, target)
    cross_entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, target.float())
    # Same sums in another order, fp32.
    torch.testing.assert_close(
        dice_binary_cross_entropy(logits, label, MEMBERS), dice + cross_entropy, rtol=1e-5, atol=1e-6
    )


def test_the_loss_of_regions_is_that_of_a_loop_without_the_ignored_voxels():
    logits, label = a_region_case()
    label[0, :2] = 255
    expected = []
    for sample in range(2):
        for region, members in enumerate(MEMBERS):
            both = either = entropy = count = 0.0
            for value, number in zip(
                logits[sample, region].ravel().tolist(), label[sample].ravel().tolist(), strict=True
            ):
                if number == 255:
                    continue
                inside, probability = bool(members[number]), 1 / (1 + math.exp(-value))
                both += probability * inside
                either += probability + inside
                entropy -= math.log(probability if inside else 1 - probability)
                count += 1
            expected.append(1 - (2 * both + 1e-5) / (either + 1e-5) + entropy / count)
    loss = dice_binary_cross_entropy(logits, label, MEMBERS)
    assert float(loss) == pytest.approx(sum(expected) / 6, rel=1e-5)
    changed = logits.clone()
    changed[0, :, :2] += 7
    assert dice_binary_cross_entropy(changed, label, MEMBERS) == loss


def test_overlaps_of_regions_equal_a_loop():
    logits, label = a_region_case()
    label[1, 0] = 255
    both, either = region_overlap_counts(logits, label, MEMBERS)
    for region, members in enumerate(MEMBERS):
        pairs = [
            (value > 0, bool(members[number]))
            for value, number in zip(logits[:, region].ravel().tolist(), label.ravel().tolist(), strict=True)
            if number != 255
        ]
        assert both[region] == sum(predicted and inside for predicted, inside in pairs)
        assert either[region] == sum(predicted + inside for predicted, inside in pairs)


def test_the_prior_of_regions_is_the_share_of_each_whatever_the_others_are():
    bias = torch.zeros(3)
    set_region_prior(bias, [0.3, 0.5, 0.0])
    assert bias.sigmoid().tolist() == pytest.approx([0.3, 0.5, 1e-6], rel=1e-3)
    with pytest.raises(ValueError, match="shares of voxels are at most 1"):
        set_region_prior(bias, [2.0, 0.5, 0.0])
