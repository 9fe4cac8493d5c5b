"""What counts as the tokens of an encoder."""

import numpy as np
import pytest
import torch

from mimscale.features.encoder import FrozenEncoder
from mimscale.features.extract import _narrowed
from mimscale.models.encoder import tokens_and_grid


def test_a_token_that_float16_cannot_hold_is_an_error_of_its_volume():
    assert _narrowed(np.array([6e4], dtype=np.float32), "float16").dtype == np.float16
    with pytest.raises(FloatingPointError, match="a token of 70000 does not fit float16; give tokens_as=float32"):
        _narrowed(np.array([-7e4, 1], dtype=np.float32), "float16")


def test_a_vit_answers_with_tokens_and_an_encoder_with_stages_with_maps_of_which_the_deepest_counts():
    tokens = torch.arange(24.0).reshape(1, 12, 2)
    found, grid = tokens_and_grid((tokens, []), (3, 2, 2))
    assert grid == (3, 2, 2)
    assert torch.equal(found, tokens)
    deepest = tokens.transpose(1, 2).reshape(1, 2, 3, 2, 2)
    found, grid = tokens_and_grid([torch.zeros(1, 4, 6, 4, 4), deepest], None)
    assert grid == (3, 2, 2)
    assert torch.equal(found, tokens)


def test_the_hash_is_that_of_the_weights():
    def hash_of(layer):
        return FrozenEncoder(layer, "x", {}, torch.device("cpu"), (1, 1, 1), 2).sha256()

    layer = torch.nn.Linear(3, 2)
    same = torch.nn.Linear(3, 2)
    same.load_state_dict(layer.state_dict())
    assert hash_of(layer) == hash_of(same)
    with torch.no_grad():
        same.bias[1] += 1e-6
    assert hash_of(layer) != hash_of(same)
