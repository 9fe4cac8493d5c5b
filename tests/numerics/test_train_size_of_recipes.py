"""The planner's formulas at the sizes of the packaged recipes: weights, products, what the backward pass needs."""

import pytest
import torch

from mimscale.bench import shapes


@pytest.fixture(params=shapes.RECIPES)
def config(request):
    return shapes.config_of(request.param)


def test_weights_and_products_are_those_of_the_model(config):
    planned, counted = shapes.planned_sizes(config), shapes.counted_sizes(config)
    assert planned.parameters == counted.parameters
    assert planned.flops == pytest.approx(counted.flops, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_backward_pass_needs_is_what_autograd_keeps(config, dtype):
    planned, kept = shapes.planned_kept_bytes(config, dtype), shapes.kept_bytes(config, dtype)
    assert planned == pytest.approx(kept, rel=0.02)
