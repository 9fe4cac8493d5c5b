"""NT-Xent against a slow loop, and its pool put together from ranks."""

import math

import torch
from torch.nn import functional as F

from mimscale.models.config import SimclrConfig, VitConfig
from mimscale.models.simclr import Simclr, contrastive_loss
from mimscale.train.contrast import pool_loss, subject_numbers

TEMPERATURE = 0.3


def some_views(crops=5):
    generator = torch.Generator().manual_seed(0)
    return F.normalize(torch.randn(2 * crops, 7, generator=generator, dtype=torch.float64), dim=1)


def loop(views, subjects):
    """The mean over all views of -log(exp(partner) / sum of exp over the partner and other subjects' views)."""
    crops, losses = len(subjects), []
    for anchor in range(2 * crops):
        partner = (anchor + crops) % (2 * crops)
        terms = {}
        for key in range(2 * crops):
            if key == partner or subjects[key % crops] != subjects[anchor % crops]:
                terms[key] = math.exp(float(views[anchor] @ views[key]) / TEMPERATURE)
        losses.append(-math.log(terms[partner] / sum(terms.values())))
    return sum(losses) / len(losses)


def test_it_is_the_textbook_loop_and_views_of_one_subject_are_no_negatives():
    views = some_views()
    for subjects in (["a", "b", "c", "d", "e"], ["a", "b", "a", "a", "c"]):
        loss = pool_loss(views, subject_numbers(subjects), TEMPERATURE)
        # fp64 sums of 10 terms.
        assert math.isclose(float(loss), loop(views, subjects), rel_tol=1e-12)


def test_a_view_neither_draws_nor_pushes_the_other_crops_of_its_subject():
    keys = some_views(3).requires_grad_()
    subjects = subject_numbers(["a", "a", "b"]).repeat(2)
    of_crop_1 = torch.tensor([1, 4])
    contrastive_loss(
        keys[of_crop_1].detach(), keys, torch.tensor([4, 1]), subjects[of_crop_1], subjects, TEMPERATURE
    ).backward()
    moved = keys.grad.abs().sum(dim=1)
    assert (moved[[0, 3]] == 0).all()  # crop 0 is of subject a too
    assert (moved[[1, 2, 4, 5]] > 0).all()


def test_a_pool_of_one_subject_has_loss_zero_and_no_gradient():
    views = some_views(3).requires_grad_()
    loss = pool_loss(views, subject_numbers(["a"] * 3), TEMPERATURE)
    loss.backward()
    assert loss == 0
    assert not views.grad.any()


def test_the_mean_of_ranks_losses_over_shared_keys_is_the_loss_of_the_pool():
    views, subjects = some_views(4), subject_numbers(["a", "b", "a", "c"])
    whole = pool_loss(views, subjects, TEMPERATURE)
    of_view = subjects.repeat(2)
    partners = torch.arange(8).roll(4)
    parts = [
        contrastive_loss(views[rows], views, partners[rows], of_view[rows], of_view, TEMPERATURE)
        for rows in (torch.tensor([0, 1, 4, 5]), torch.tensor([2, 3, 6, 7]))
    ]
    torch.testing.assert_close(sum(parts) / 2, whole, rtol=1e-12, atol=0)


def test_every_weight_gets_a_gradient_and_embeddings_have_length_one():
    torch.manual_seed(0)
    model = Simclr(
        VitConfig(dim=24, depth=2, heads=2),
        SimclrConfig(projection_dim=8, hidden_dim=16),
        crop_voxels=(8, 8, 8),
        patch_voxels=(4, 4, 4),
        channels=1,
    )
    views = model(torch.randn(6, 1, 8, 8, 8))
    torch.testing.assert_close(views.norm(dim=1), torch.ones(6))
    pool_loss(views, subject_numbers(["a", "b", "c"]), TEMPERATURE).backward()
    without = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert without == []
