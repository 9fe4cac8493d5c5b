"""Every network, small, on a device that computes shapes alone."""

from dataclasses import replace

import torch

from mimscale.bench.synthetic import synthetic_batch
from mimscale.config import load_config, split_arguments
from mimscale.train.config import FinetuneConfig, PretrainConfig

CROP = ["crop_voxels=[16,32,32]", "patch_voxels=[4,8,8]"]
VIT = [*CROP, "model={dim: 48, depth: 2, heads: 4, drop_path: 0.1}"]
RESENC = [*CROP, "model={features: [4, 8, 8], blocks: [1, 2, 1], strides: [[1, 1, 1], [1, 2, 2], [2, 2, 2]]}"]
SWIN = [*CROP[:1], "patch_voxels=[1,2,2]", "model={dim: 12, depths: [2, 2], heads: [2, 4], window: [2, 3, 3]}"]
WARPED = (
    "augment={flip_prob: [0.5, 0.5, 0.5], affine_prob: 1.0, rotate_deg: [9, 9, 9], scale_prob: 1.0, gamma_prob: 1.0}"
)
DECODER = "mae={decoder_dim: 48, decoder_depth: 2, decoder_heads: 4}"
NETWORKS = {
    "mae": ["demo/pretrain", *VIT, DECODER],
    "mae, less work": ["demo/pretrain", *VIT, DECODER, "mask={predicted_share: 0.5, repeats: 2}"],
    "simmim": ["pretrain_simmim_vit_b", *VIT],
    "simclr": ["pretrain_simclr_vit_b", *VIT],
    "resenc_mae": ["pretrain_mae_resenc_l", *RESENC],
    "swin_simmim": ["pretrain_simmim_swin_b", *SWIN, "mask={ratio: 0.6, unit_voxels: [4, 8, 8]}"],
    "unetr": ["finetune_unetr", *VIT, "patch_voxels=[8,8,8]"],
    "primus": ["finetune_primus", *VIT, "patch_voxels=[8,8,8]"],
    "linear": ["finetune_linear_probe", *VIT, "model.drop_path=0"],
    "resenc": ["finetune_resenc", *RESENC, "resenc={deep_supervision: true}"],
    "swin_unetr": ["finetune_swin_unetr", *SWIN],
    "swin_upernet": ["finetune_swin_unetr", "head=swin_upernet", "swin_upernet={width: 8}", *SWIN],
}


def run_config(words):
    """Of pretraining or fine-tuning, by its recipe's name."""
    kind = FinetuneConfig if words[0].startswith("finetune") else PretrainConfig
    (recipe,), overrides = split_arguments([*words, "store=none", "run_dir=none"])
    return load_config(kind, recipe, overrides)


def without_numbers(name):
    """Objective, model and batch of one of them: a value that had to come back would raise."""
    config = run_config([*NETWORKS[name], WARPED, "micro_batch=2", "global_batch=2"])
    objective, device = config.network.objective(config), torch.device("meta")
    model = objective.build(1).to(device)
    batch = synthetic_batch(config, 1, device)
    if config.kind == "finetune":
        batch = replace(batch, label=torch.zeros(2, *config.crop_voxels, dtype=torch.uint8, device=device))
    return objective, model, batch
