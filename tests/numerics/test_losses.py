import torch
from monai.losses import DiceCELoss

from mimscale.train.losses import dice_cross_entropy, overlap_counts


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
