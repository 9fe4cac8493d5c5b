"""`engine.deterministic` on a GPU: nothing that torch refuses then, and the same numbers."""

import re

import pytest
import torch
from tiny_networks import NETWORKS, without_numbers
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from mimscale.models.averages import BoxMean, averaged

# Of torch.use_deterministic_algorithms: what raises on a CUDA device. Sums of nll_loss2d do, its voxels do not.
REFUSED = re.compile(
    r"_?adaptive_(avg|max)_pool[23]d_backward|avg_pool3d_backward|max_pool3d_with_indices_backward|max_unpool.*|fractional_max_pool.*"
    r"|upsample_(linear1d|bilinear2d|bicubic2d|trilinear3d)_backward|(reflection|replication)_pad[123]d_backward"
    r"|grid_sampler_[23]d_backward|histc|median|kthvalue|put_|ctc_loss_backward"
)


class Refused(TorchDispatchMode):
    """Notes the operations that a GPU would refuse."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        sums_voxels = name == "nll_loss2d_forward" and args[3] != 0
        sums_floats = name in ("cumsum", "cumsum_") and args[0].is_floating_point()
        if sums_voxels or sums_floats or REFUSED.fullmatch(name):
            self.names.add(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", NETWORKS)
def test_no_network_asks_for_what_a_gpu_refuses_then(name, deterministic):
    objective, model, batch = without_numbers(name)
    with Refused() as watch:
        objective.loss(model, batch).backward()
    assert watch.names == set()


def test_what_a_gpu_refuses_is_seen():
    volume = torch.ones(1, 1, 4, 4, 4, requires_grad=True)
    with Refused() as watch:
        functional.avg_pool3d(volume, 2).sum().backward()
        functional.interpolate(volume, size=(3, 3, 3), mode="trilinear").sum().backward()
        averaged(volume, (3, 3, 3)).sum().backward()
    assert watch.names == {"avg_pool3d_backward", "upsample_trilinear3d_backward", "_adaptive_avg_pool3d_backward"}


@pytest.mark.parametrize("resize", [lambda volume: averaged(volume, (3, 5, 1)), BoxMean((2, 1, 3), (2, 1, 3))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_other_way(resize, dtype, deterministic):
    torch.manual_seed(5)
    volume = torch.randn(2, 3, 6, 7, 9, dtype=dtype)

    def both(values):
        values = values.clone().requires_grad_()
        out = resize(values)
        weights = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
        (gradient,) = torch.autograd.grad((out.float() * weights).sum(), values)
        return out, gradient

    found = both(volume)
    torch.use_deterministic_algorithms(False)
    expected = both(volume.float())
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.float(), other, rtol=tolerance, atol=tolerance)
