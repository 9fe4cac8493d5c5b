import pytest
import torch

from mimscale.models.config import VitConfig
from mimscale.models.positions import pairs_per_axis, resize_table, sincos_table
from mimscale.models.vit import Branch, Vit

CROP, PATCH = (4, 6, 16), (2, 3, 4)  # a grid of 2 x 2 x 4


def small_vit(**changes):
    torch.manual_seed(0)
    config = VitConfig(**{"dim": 24, "depth": 3, "heads": 2, **changes})
    return Vit(config, crop_voxels=CROP, patch_voxels=PATCH, channels=2)


@pytest.mark.parametrize("positions", ["sincos", "learned", "rope", "rope_learned"])
@pytest.mark.parametrize("layer_scale", [None, 0.1])
def test_every_parameter_gets_a_gradient(positions, layer_scale):
    vit = small_vit(positions=positions, layer_scale=layer_scale)
    tokens, _ = vit(torch.randn(2, 2, *CROP))
    (tokens * torch.randn_like(tokens)).sum().backward()
    without = [name for name, value in vit.named_parameters() if value.grad is None or not value.grad.any()]
    assert without == []


@pytest.mark.parametrize("positions", ["sincos", "learned", "rope", "rope_learned"])
def test_showing_all_patches_by_index_is_showing_the_volume(positions):
    vit, volume = small_vit(positions=positions), torch.randn(2, 2, *CROP)
    whole, _ = vit(volume)
    indexed, _ = vit(volume, torch.arange(16).expand(2, -1))
    assert torch.allclose(whole, indexed, atol=1e-6)


@pytest.mark.parametrize("positions", ["sincos", "learned", "rope", "rope_learned"])
def test_hidden_patches_have_no_influence(positions):
    vit, volume = small_vit(positions=positions), torch.randn(1, 2, *CROP)
    visible = torch.tensor([[0, 5, 6, 15]])
    before, _ = vit(volume, visible)
    changed = volume.clone()
    changed[..., 0:2, 0:3, 4:8] += 1  # patch 1, hidden
    assert torch.equal(vit(changed, visible)[0], before)
    changed[..., 0:2, 3:6, 4:8] += 1  # patch 5, visible
    assert not torch.allclose(vit(changed, visible)[0], before, atol=1e-3)


@pytest.mark.parametrize("positions", ["sincos", "learned", "rope", "rope_learned"])
def test_the_same_patches_at_other_places_give_other_tokens(positions):
    vit, volume = small_vit(positions=positions), torch.ones(1, 2, *CROP)
    volume[..., 8:] = 2.0  # two kinds of patches
    first, _ = vit(volume, torch.tensor([[0, 2]]))
    second, _ = vit(volume, torch.tensor([[0, 14]]))
    assert not torch.allclose(first, second, atol=1e-3)


def test_hidden_states_are_those_after_the_blocks_asked_for():
    vit, volume = small_vit(), torch.randn(1, 2, *CROP)
    tokens, (last, embedding, again) = vit(volume, keep=[3, 0, 3])
    assert torch.equal(vit.norm(last), tokens)
    assert torch.equal(last, again)
    assert torch.allclose(vit.blocks[2](vit.blocks[1](vit.blocks[0](embedding))), last, atol=1e-6)


def test_recomputing_activations_changes_neither_output_nor_gradients():
    volume = torch.randn(2, 2, *CROP)
    results = []
    for checkpointed in (False, True):
        vit = small_vit(checkpoint_activations=checkpointed, drop_path=0.5)
        torch.manual_seed(3)
        tokens, _ = vit(volume)
        tokens.square().mean().backward()
        results.append([tokens, *(value.grad for value in vit.parameters())])
    assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))


def test_weights_cast_to_bf16_take_an_fp32_volume():
    for positions in ("sincos", "learned", "rope", "rope_learned"):
        vit = small_vit(positions=positions)
        volume = torch.randn(1, 2, *CROP)
        exact, _ = vit(volume)
        coarse, _ = vit.bfloat16()(volume)
        assert coarse.dtype == torch.bfloat16
        assert (coarse.float() - exact).abs().mean() < 0.02  # 8 bits of mantissa: 0.004 of each number of about 1


def test_drop_path_leaves_out_whole_samples_and_keeps_the_expectation():
    torch.manual_seed(0)
    branch = Branch(4, None, 0.25)
    added = branch(torch.zeros(4000, 2, 4), torch.ones(4000, 2, 4))
    per_sample = added.flatten(1)
    assert torch.equal(per_sample.amin(1), per_sample.amax(1))
    assert per_sample[:, 0].unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert abs(per_sample.mean() - 1) < 0.05
    assert torch.equal(branch.eval()(torch.zeros(2, 2, 4), torch.ones(2, 2, 4)), torch.ones(2, 2, 4))


def test_drop_path_rises_from_nothing_to_the_last_block():
    vit = small_vit(drop_path=0.2)
    assert [block.mlp_branch.drop_path for block in vit.blocks] == [0.0, 0.1, 0.2]


@pytest.mark.parametrize(
    ("dim", "pairs"), [(768, (128, 128, 128)), (512, (86, 85, 85)), (64, (11, 11, 10)), (7, (1, 1, 1))]
)
def test_any_dim_is_shared_by_the_three_axes(dim, pairs):
    assert pairs_per_axis(dim) == pairs
    assert sincos_table((2, 3, 4), dim).shape == (2, 3, 4, dim)


@pytest.mark.parametrize("dim", [6, 20, 64, 512])
def test_sincos_positions_differ_between_any_two_patches(dim):
    table = sincos_table((5, 7, 6), dim).flatten(0, 2)
    distances = torch.cdist(table, table) + 10 * torch.eye(len(table))
    assert distances.min() > 0.1


def test_an_odd_dim_leaves_its_last_column_zero():
    table = sincos_table((2, 2, 2), 13)
    assert not table[..., 12].any()
    assert table[..., :12].any(dim=(0, 1, 2)).all()


def test_resizing_a_table_keeps_what_is_linear_inside():
    z, y, x = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), torch.arange(2.0), indexing="ij")
    table = torch.stack([z, y + x], dim=-1)  # [4, 4, 2, 2]
    finer = resize_table(table, (8, 4, 2))
    assert finer.shape == (8, 4, 2, 2)
    assert torch.allclose(finer[1:-1, 0, 0, 0], torch.linspace(0.25, 2.75, 6))
    assert torch.allclose(finer[..., 1], table[:1, :, :, 1].expand(8, -1, -1))
    assert torch.equal(resize_table(table, (4, 4, 2)), table)


def test_a_gated_mlp_is_the_formula_and_has_as_many_weights_as_a_plain_one():
    vit, plain = small_vit(mlp="swiglu", dim=48), small_vit(dim=48)
    mlp = vit.blocks[0].mlp
    tokens = torch.randn(2, 3, 48)
    hidden = tokens @ mlp.rise.weight.T + mlp.rise.bias
    gate, value = hidden[..., :128], hidden[..., 128:]
    expected = (gate / (1 + (-gate).exp()) * value) @ mlp.fall.weight.T + mlp.fall.bias
    assert torch.allclose(mlp(tokens), expected, atol=1e-5)
    counts = [sum(weight.numel() for weight in model.parameters()) for model in (vit, plain)]
    assert counts[0] == pytest.approx(counts[1], rel=5e-3)


def test_masked_patches_are_the_token_at_their_place_and_nothing_of_the_image():
    vit, volume = small_vit(), torch.randn(2, 2, *CROP)
    hidden = torch.zeros(2, 16, dtype=torch.bool)
    hidden[:, [1, 7]] = True
    token = torch.randn(24)
    before, (embedding,) = vit(volume, keep=[0], masked=(hidden, token))
    assert torch.allclose(embedding[0, 7], token + vit.positions.flatten(0, 2)[7])
    changed = volume.clone()
    changed[..., 0:2, 0:3, 4:8] += 1  # patch 1, hidden
    assert torch.equal(vit(changed, masked=(hidden, token))[0], before)
    changed[..., 0:2, 3:6, 4:8] += 1  # patch 5, visible
    assert not torch.allclose(vit(changed, masked=(hidden, token))[0], before, atol=1e-3)
