"""UperNet against the same computed with numpy, as its paper says it (arXiv:1807.10221, sec. 3.1; arXiv:1612.01105).

F features | z y x voxels of a state
"""

import numpy as np
import torch

from mimscale.models.config import SwinConfig, UnetrConfig, UpernetConfig
from mimscale.models.upernet import Upernet

NORM_FLOOR = 1e-5  # torch's, below the variance
SWIN = SwinConfig(dim=12, depths=(1, 1), heads=(2, 2), window=(2, 2, 2))
CROP = (8, 16, 24)  # the states have 4 x 8 x 12, 2 x 4 x 6 and 1 x 2 x 3 voxels: fewer than some of the pooled ones


def convolved(features, weight, bias=None):
    """A convolution of an odd edge with zeros around: [F, z, y, x] and [G, F, k, k, k] -> [G, z, y, x]."""
    edge, (z, y, x) = weight.shape[2], features.shape[1:]
    padded = np.pad(features, [(0, 0), *3 * [(edge // 2, edge // 2)]])
    out = np.zeros((len(weight), z, y, x))
    for i, j, k in np.ndindex(edge, edge, edge):
        out += np.einsum("gf,fzyx->gzyx", weight[:, :, i, j, k], padded[:, i : i + z, j : j + y, k : k + x])
    return out if bias is None else out + bias[:, None, None, None]


def normed(features, weight, bias):
    """Each channel with mean 0 and deviation 1, then scaled and shifted."""
    out = np.empty_like(features)
    for channel, numbers in enumerate(features):
        scaled = (numbers - numbers.mean()) / np.sqrt(numbers.var() + NORM_FLOOR)
        out[channel] = scaled * weight[channel] + bias[channel]
    return out


def block(features, weights, name):
    conv, scale, shift = (weights[f"{name}.{part}"] for part in ("0.weight", "1.weight", "1.bias"))
    return np.maximum(normed(convolved(features, conv), scale, shift), 0)


def pooled(features, edge):
    """Means over `edge` pieces along each axis; a piece begins and ends at the nearest whole voxels outside of it."""

    def pieces(length):
        return [(place * length // edge, -(-(place + 1) * length // edge)) for place in range(edge)]

    out = np.empty((len(features), edge, edge, edge))
    for i, (z, to_z) in enumerate(pieces(features.shape[1])):
        for j, (y, to_y) in enumerate(pieces(features.shape[2])):
            for k, (x, to_x) in enumerate(pieces(features.shape[3])):
                out[:, i, j, k] = features[:, z:to_z, y:to_y, x:to_x].mean((1, 2, 3))
    return out


def resized(features, edges):
    """Linear between the middles of voxels, constant beyond the outermost ones; one axis after another."""
    for axis, edge in enumerate(edges, start=1):
        length = features.shape[axis]
        places = np.clip((np.arange(edge) + 0.5) * length / edge - 0.5, 0, length - 1)
        below = np.floor(places).astype(int)
        above, share = np.minimum(below + 1, length - 1), places - below
        shape = [-1 if other == axis else 1 for other in range(4)]
        share = share.reshape(shape)
        features = (1 - share) * features.take(below, axis) + share * features.take(above, axis)
    return features


def reference(states, weights, crop):
    """Scores [K, Z, Y, X] from the encoder's states, finest first."""
    coarsest = states[-1]
    context = [coarsest]
    for place, edge in enumerate((1, 2, 3, 6)):
        conv, bias = weights[f"pooled.{place}.0.weight"], weights[f"pooled.{place}.0.bias"]
        context.append(resized(np.maximum(convolved(pooled(coarsest, edge), conv, bias), 0), coarsest.shape[1:]))
    carried = block(np.concatenate(context), weights, "context")
    levels = [carried]
    for place in range(len(states) - 2, -1, -1):  # top down
        lateral = block(states[place], weights, f"laterals.{place}")
        carried = lateral + resized(carried, lateral.shape[1:])
        levels.append(block(carried, weights, f"smooth.{place}"))
    finest = states[0].shape[1:]
    fused = block(np.concatenate([resized(level, finest) for level in levels]), weights, "fuse")
    return resized(convolved(fused, weights["out.weight"], weights["out.bias"]), crop)


def test_a_upernets_scores_are_those_of_plain_loops():
    torch.manual_seed(0)
    shape = {"crop_voxels": CROP, "patch_voxels": (2, 2, 2), "channels": 1}
    model = Upernet(SWIN, UnetrConfig(num_classes=3), UpernetConfig(width=5), **shape)
    for value in model.parameters():  # norms and biases away from 1 and 0
        torch.nn.init.normal_(value, std=0.3)
    image = torch.randn(1, 1, *CROP)
    with torch.no_grad():
        scores, states = model(image), model.encoder(image)
    weights = {name: value.double().numpy() for name, value in model.state_dict().items()}
    expected = reference([state[0].double().numpy() for state in states], weights, CROP)
    # The encoder's states are given; what follows is a dozen layers in fp32.
    np.testing.assert_allclose(scores[0].numpy(), expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected).max() > 0.1
