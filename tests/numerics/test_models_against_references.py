"""Attention and the encoder against a slow loop and against MONAI, in fp32 or fp64."""

import math

import torch
from monai.networks.nets.unetr import UNETR
from monai.networks.nets.vit import ViT

from mimscale.models.config import UnetrConfig, VitConfig
from mimscale.models.positions import angles, grid_coordinates, rotate
from mimscale.models.unetr import Unetr
from mimscale.models.vit import Attention, Vit


@torch.no_grad()
def test_attention_is_the_textbook_loop():
    torch.manual_seed(0)
    B, K, D, heads = 2, 5, 12, 3
    attention = Attention(D, heads).double()
    tokens = torch.randn(B, K, D, dtype=torch.float64)
    H = D // heads
    weight, bias = attention.qkv.weight, attention.qkv.bias
    expected = torch.zeros(B, K, D, dtype=torch.float64)
    for b in range(B):
        for head in range(heads):
            rows = [slice(part * D + head * H, part * D + (head + 1) * H) for part in range(3)]
            query, key, value = (tokens[b] @ weight[r].T + bias[r] for r in rows)
            for i in range(K):
                scores = [math.exp(float(query[i] @ key[j]) / math.sqrt(H)) for j in range(K)]
                for j in range(K):
                    expected[b, i, head * H : (head + 1) * H] += scores[j] / sum(scores) * value[j]
    expected = expected @ attention.out.weight.T + attention.out.bias
    # fp64 sums of 5 to 36 terms of about 1: rounding of 1e-15 each.
    assert torch.allclose(attention(tokens), expected, atol=1e-12)


def test_rotary_scores_depend_on_differences_of_positions_only():
    torch.manual_seed(0)
    H = 20  # 10 pairs: 4 for Z, 3 for Y, 3 for X
    query, key = torch.randn(1, 1, 1, H).double(), torch.randn(1, 1, 1, H).double()

    def score(query_at, key_at):
        turned = [
            rotate(heads, angles(torch.tensor([at]), H)[None]) for heads, at in ((query, query_at), (key, key_at))
        ]
        return float((turned[0] * turned[1]).sum())

    # Rotations are computed in fp32, with angles of up to 10: 1e-6 each, over 20 products.
    here = score([1, 2, 3], [4, 2, 1])
    assert math.isclose(here, score([3, 7, 5], [6, 7, 3]), abs_tol=2e-5)
    for moved in ([4, 2, 2], [4, 3, 1], [5, 2, 1]):
        assert not math.isclose(here, score([1, 2, 3], moved), abs_tol=1e-3)
    assert math.isclose(score([0, 0, 0], [0, 0, 0]), float((query * key).sum()), abs_tol=1e-5)


def test_a_head_that_does_not_divide_into_pairs_for_three_axes_keeps_its_length():
    heads = torch.randn(1, 2, 24, 13)
    turned = rotate(heads, angles(grid_coordinates((2, 3, 4)), 13)[None])
    assert torch.allclose(turned.norm(dim=-1), heads.norm(dim=-1), atol=1e-5)
    assert torch.equal(turned[..., 12], heads[..., 12])


def test_the_encoder_gives_the_features_of_monais_vit_with_the_same_weights():
    torch.manual_seed(0)
    crop, patch, dim, depth, heads, channels = (8, 16, 32), (4, 8, 8), 48, 3, 4, 2
    theirs = ViT(channels, crop, patch, dim, 4 * dim, depth, heads, proj_type="perceptron", qkv_bias=True)
    torch.nn.init.normal_(theirs.patch_embedding.position_embeddings)
    ours = Vit(
        VitConfig(dim=dim, depth=depth, heads=heads, positions="learned"),
        crop_voxels=crop,
        patch_voxels=patch,
        channels=channels,
    )
    ours.load_state_dict(copied_from(theirs.state_dict(), ours, depth))  # strict: nothing of ours is left out

    volume = torch.randn(2, channels, *crop)
    expected, expected_states = theirs(volume)
    tokens, states = ours(volume, keep=[1, 2, 3])
    # fp32, three blocks of sums over up to 192 terms, another order of summation in SDPA: a few 1e-6 on values of 1.
    assert torch.allclose(tokens, expected, atol=2e-5)
    for state, expected_state in zip(states, expected_states, strict=True):
        assert torch.allclose(state, expected_state, atol=5e-5)


def copied_from(source, ours, depth):
    """MONAI's ViT weights by our names."""
    names = {
        "norm1": "attention_norm",
        "attn.qkv": "attention.qkv",
        "attn.out_proj": "attention.out",
        "norm2": "mlp_norm",
        "mlp.linear1": "mlp.rise",
        "mlp.linear2": "mlp.fall",
    }
    copied = {
        "positions": source["patch_embedding.position_embeddings"].reshape(ours.positions.shape),
        "projection.weight": source["patch_embedding.patch_embeddings.1.weight"],
        "projection.bias": source["patch_embedding.patch_embeddings.1.bias"],
        "norm.weight": source["norm.weight"],
        "norm.bias": source["norm.bias"],
    }
    for block in range(depth):
        for their_name, our_name in names.items():
            for kind in ("weight", "bias"):
                copied[f"blocks.{block}.{our_name}.{kind}"] = source[f"blocks.{block}.{their_name}.{kind}"]
    return copied


@torch.no_grad()
def test_a_unetr_of_the_one_shape_that_monai_has_gives_its_scores_with_the_same_weights():
    torch.manual_seed(0)
    crop, dim, depth, heads = (32, 16, 48), 24, 12, 2  # a patch of 16 and 12 blocks are built into MONAI's
    theirs = UNETR(
        1,
        3,
        crop,
        feature_size=4,
        hidden_size=dim,
        mlp_dim=4 * dim,
        num_heads=heads,
        proj_type="perceptron",
        norm_name="instance",
        res_block=True,
        qkv_bias=True,
    ).eval()
    torch.nn.init.normal_(theirs.vit.patch_embedding.position_embeddings)
    ours = Unetr(
        VitConfig(dim=dim, depth=depth, heads=heads, positions="learned"),
        UnetrConfig(num_classes=3, feature_size=4),
        crop_voxels=crop,
        patch_voxels=(16, 16, 16),
        channels=1,
    ).eval()
    ours.encoder.load_state_dict(copied_from(theirs.vit.state_dict(), ours.encoder, depth))
    ours.image_skip.load_state_dict(theirs.encoder1.state_dict())
    # Finest first; MONAI names the transposed convolution and the residual block of a step, we list them.
    for skip, their_skip in zip(ours.token_skips, (theirs.encoder2, theirs.encoder3, theirs.encoder4), strict=True):
        ordered = [their_skip.transp_conv_init, *(part for step in their_skip.blocks for part in step)]
        for part, their_part in zip(skip, ordered, strict=True):
            weights = {name.removeprefix("conv."): value for name, value in their_part.state_dict().items()}
            part.load_state_dict(weights if isinstance(part, torch.nn.ConvTranspose3d) else their_part.state_dict())
    steps = (theirs.decoder5, theirs.decoder4, theirs.decoder3, theirs.decoder2)
    for step, their_step in zip(ours.up_steps, steps, strict=True):
        step.load_state_dict(their_step.state_dict())
    ours.out.load_state_dict(theirs.out.state_dict())
    # The paper takes the states after blocks 3, 6 and 9, as we do; MONAI counts from 0 and takes one block more.
    assert ours.skip_states == [3, 6, 9]
    ours.skip_states = [4, 7, 10]
    image = torch.randn(1, 1, *crop)
    # fp32 through 12 blocks and 5 convolutional levels with instance norms.
    torch.testing.assert_close(ours(image), theirs(image), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_rotary_positions_are_the_textbook_loop():
    torch.manual_seed(0)
    grid, H = (2, 3, 4), 14  # 7 pairs: 3 for Z, 2 for Y, 2 for X
    heads = torch.randn(1, 2, 24, H, dtype=torch.float64)
    turned = rotate(heads, angles(grid_coordinates(grid), H)[None])
    for token in range(24):
        place = (token // 12, token // 4 % 3, token % 4)
        pair = 0
        for axis, pairs in enumerate((3, 2, 2)):
            for number in range(pairs):
                angle = place[axis] * 10_000 ** (-number / pairs)
                for head in range(2):
                    first, second = (float(heads[0, head, token, index]) for index in (pair, pair + 7))
                    expected = (
                        first * math.cos(angle) - second * math.sin(angle),
                        first * math.sin(angle) + second * math.cos(angle),
                    )
                    found = [float(turned[0, head, token, index]) for index in (pair, pair + 7)]
                    # Angles and products in fp32.
                    assert math.isclose(found[0], expected[0], abs_tol=1e-5)
                    assert math.isclose(found[1], expected[1], abs_tol=1e-5)
                pair += 1
