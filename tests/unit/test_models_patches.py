import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimscale.models.patches import hidden_voxels, patchify, tokens_to_grid, unpatchify

EDGES = st.tuples(*[st.integers(1, 4)] * 3)


@settings(max_examples=40, deadline=None)
@given(patch=EDGES, grid=EDGES, channels=st.integers(1, 3), batch=st.integers(1, 2))
def test_unpatchify_undoes_patchify(patch, grid, channels, batch):
    crop = [count * edge for count, edge in zip(grid, patch, strict=True)]
    volume = torch.randn(batch, channels, *crop)
    patches = patchify(volume, patch)
    assert patches.shape == (batch, grid[0] * grid[1] * grid[2], patch[0] * patch[1] * patch[2] * channels)
    assert torch.equal(unpatchify(patches, patch, grid), volume)


def test_a_patch_holds_the_voxels_of_its_box_with_the_channel_fastest():
    volume = torch.arange(2 * 4 * 6 * 8.0).reshape(1, 2, 4, 6, 8)
    patches = patchify(volume, (2, 3, 4))
    z, y, x = 1, 0, 1
    box = volume[0, :, 2:4, 0:3, 4:8]
    assert torch.equal(patches[0, (z * 2 + y) * 2 + x], box.permute(1, 2, 3, 0).flatten())


def test_a_crop_that_does_not_divide_is_refused_with_both_values():
    with pytest.raises(ValueError, match=r"crop_voxels=\[4, 6, 9\] does not divide .* patch_voxels=\[2, 3, 4\]"):
        patchify(torch.zeros(1, 1, 4, 6, 9), (2, 3, 4))


def test_a_grid_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"8 patches do not fill a grid of \[2, 2, 3\]"):
        unpatchify(torch.zeros(1, 8, 8), (2, 2, 2), (2, 2, 3))


def test_tokens_land_where_their_patches_were():
    grid, patch = (2, 3, 4), (1, 2, 2)
    volume = torch.randn(2, 1, 2, 6, 8)
    means = patchify(volume, patch).mean(dim=2, keepdim=True)  # [B, L, 1]
    pooled = torch.nn.functional.avg_pool3d(volume, patch)
    assert torch.allclose(tokens_to_grid(means, grid), pooled, atol=1e-6)


def test_hidden_patches_become_their_voxels():
    hidden = torch.zeros(1, 2 * 3 * 4, dtype=torch.bool)
    hidden[0, (1 * 3 + 2) * 4 + 0] = True
    voxels = hidden_voxels(hidden, (2, 3, 4), (2, 3, 4))
    expected = torch.zeros(1, 1, 4, 9, 16, dtype=torch.bool)
    expected[..., 2:4, 6:9, 0:4] = True
    assert torch.equal(voxels, expected)
