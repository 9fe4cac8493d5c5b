"""Sizes, FLOPs and memory of the other encoders' networks by formula, against the same networks without numbers."""

import pytest

from mimscale.config import build_config
from mimscale.models.flops import Flops
from mimscale.train.config import FinetuneConfig, PretrainConfig
from mimscale.train.counted import counted

RUN = {"store": "none", "run_dir": "none", "steps": 1, "global_batch": 1, "micro_batch": 1}
RESENC = {
    "features": [4, 8, 16],
    "blocks": [1, 2, 1],
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
    "kernels": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
    "decoder_convs": 2,
}
SWIN = {"dim": 12, "depths": [2, 3], "heads": [2, 3], "window": [4, 4, 4]}
UNEVEN = {**SWIN, "window": [3, 5, 7]}  # windows that do not divide the grid, and one that is larger
PRIMUS = {"dim": 24, "depth": 2, "heads": 2}
CHECKPOINTED = {"checkpoint_activations": True}
OF_RESENC = {"crop_voxels": [8, 16, 16], "patch_voxels": [4, 8, 8], "model": RESENC}
OF_SWIN = {"crop_voxels": [16, 16, 24], "patch_voxels": [2, 2, 2], "model": SWIN}
CLASSES = {"unetr": {"num_classes": 3}}
HIDDEN = {"mask": {"ratio": 0.5, "unit_voxels": [8, 8, 8]}}
TARGETS = {"targets": {"table": "none", "classify": ["sex"], "regress": ["age"]}}
ATTENTION = {"targets": TARGETS["targets"] | {"pool": "attention"}}
OF_VIT = {"crop_voxels": [16, 16, 16], "patch_voxels": [4, 4, 4], "model": PRIMUS}
RUNS = {
    "targets": (FinetuneConfig, OF_VIT | {"head": "targets"} | TARGETS),
    "targets, attention": (FinetuneConfig, OF_VIT | {"head": "targets"} | ATTENTION),
    "swin_targets": (FinetuneConfig, OF_SWIN | {"head": "swin_targets"} | TARGETS),
    "swin_targets, attention": (FinetuneConfig, OF_SWIN | {"head": "swin_targets"} | ATTENTION),
    "resenc_targets": (FinetuneConfig, OF_RESENC | {"head": "resenc_targets"} | TARGETS),
    "resenc_targets, attention": (FinetuneConfig, OF_RESENC | {"head": "resenc_targets"} | ATTENTION),
    "resenc_mae": (PretrainConfig, OF_RESENC | {"method": "resenc_mae"}),
    "resenc_mae, loss on all, recomputed": (
        PretrainConfig,
        OF_RESENC
        | {"method": "resenc_mae", "resenc_mae": {"loss_on": "all"}, "mask": {"repeats": 2}}
        | {"model": RESENC | CHECKPOINTED},
    ),
    "resenc": (FinetuneConfig, OF_RESENC | CLASSES | {"head": "resenc"}),
    "resenc, deep supervision": (
        FinetuneConfig,
        OF_RESENC | CLASSES | {"head": "resenc", "resenc": {"deep_supervision": True}},
    ),
    "swin_simmim": (PretrainConfig, OF_SWIN | HIDDEN | {"method": "swin_simmim"}),
    "swin_simmim, uneven windows": (PretrainConfig, OF_SWIN | HIDDEN | {"method": "swin_simmim", "model": UNEVEN}),
    "swin_unetr": (FinetuneConfig, OF_SWIN | CLASSES | {"head": "swin_unetr"}),
    "swin_unetr, recomputed": (
        FinetuneConfig,
        OF_SWIN | CLASSES | {"head": "swin_unetr", "model": SWIN | CHECKPOINTED},
    ),
    "swin_upernet": (
        FinetuneConfig,
        OF_SWIN | CLASSES | {"head": "swin_upernet", "swin_upernet": {"width": 8}},
    ),
    "primus": (
        FinetuneConfig,
        {"head": "primus", "crop_voxels": [16, 16, 16], "patch_voxels": [2, 8, 8], "model": PRIMUS} | CLASSES,
    ),
    "primus as published": (
        FinetuneConfig,
        {"head": "primus", "crop_voxels": [16, 16, 16], "patch_voxels": [4, 4, 4]}
        | {"model": PRIMUS | {"positions": "rope_learned", "mlp": "swiglu", "layer_scale": 0.1}}
        | CLASSES,
    ),
}


@pytest.fixture(params=RUNS.values(), ids=RUNS.keys())
def config(request):
    kind, tree = request.param
    return build_config(kind, RUN | tree, "test")


@pytest.mark.parametrize("channels", [1, 3])
def test_weights_and_flops_are_those_of_the_network(config, channels):
    truth, network = counted(config, channels), config.network
    assert sorted(network.parameter_sizes(config, channels)) == sorted(truth.parameter_sizes)
    flops = sum(network.flops(config, channels).values(), start=Flops(forward=0, backward=0))
    # The count sees the same products, one by one.
    assert (flops.forward, flops.backward) == pytest.approx((truth.flops.forward, truth.flops.backward), rel=1e-3)
    if config.network.name not in (
        "primus",
        "targets",
    ):  # its attention is fused and computes scores again, which the count does not do
        assert flops.recomputed == pytest.approx(truth.flops.recomputed, rel=1e-3)


@pytest.mark.parametrize("width", [4, 2], ids=["fp32", "bf16"])
def test_what_is_kept_is_what_autograd_keeps(config, width):
    truth, ours = counted(config, 1).activations(width), config.network.activations(config, width, 1)
    # Left out: means of norms, and masks of shifted windows, which are held once whatever the micro-batch.
    recomputes_windows = config.network.name == "swin_unetr" and config.model.checkpoint_activations
    assert ours.kept == pytest.approx(truth.kept - (MASK_BYTES if recomputes_windows else 0), rel=0.02)


# Of 8 x 8 x 12 and 4 x 4 x 6 tokens: 12 and 2 windows of 64 tokens, fp32.
MASK_BYTES = (12 + 2) * 64 * 64 * 4
