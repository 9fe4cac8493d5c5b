import pytest
import torch
from torch import nn

from mimscale.errors import ConfigError
from mimscale.train.config import EngineConfig, OptimConfig, PretrainConfig, accumulation
from mimscale.train.deepspeed_config import deepspeed_config
from mimscale.train.optim import learning_rate, lr_scale, parameter_groups


def test_the_rate_rises_linearly_then_falls_to_its_minimum():
    config = OptimConfig(lr=1.0, warmup_steps=4, min_lr_ratio=0.1)
    rates = [learning_rate(config, step, 24) for step in range(25)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[14] == pytest.approx(0.55)  # half of the cosine
    assert rates[24] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_layer_decay_falls_from_the_head_down_to_the_embedding():
    config = OptimConfig(layer_decay=0.5, head_lr_ratio=10.0)
    names = [
        "decoder.x",
        "encoder.norm.weight",
        "encoder.blocks.1.a",
        "encoder.blocks.0.a",
        "encoder.projection.weight",
    ]
    assert [lr_scale(name, config, depth=2) for name in names] == [10.0, 1.0, 0.5, 0.25, 0.125]


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(2, 3)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 3))
        self.head = nn.Linear(3, 2)
        self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)


def test_every_trained_parameter_is_in_exactly_one_group_and_vectors_are_not_decayed():
    model = Small()
    groups = parameter_groups(model, OptimConfig(weight_decay=0.1, head_lr_ratio=2.0), depth=1)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    decayed = {id(p) for group in groups if group["weight_decay"] > 0 for p in group["params"]}
    assert decayed == {id(model.encoder.weight), id(model.head.weight)}
    assert {group["lr_scale"] for group in groups} == {0.25 * 4, 2.0}


def test_deepspeeds_config_says_every_value_that_changed_its_default():
    tree = deepspeed_config(
        EngineConfig(zero_stage=2, clip_grad_norm=0.5), precision="bf16", micro_batch=3, accumulation=4, world_size=2
    )
    assert tree["train_batch_size"] == 24
    assert tree["gradient_accumulation_steps"] == 4
    assert tree["gradient_clipping"] == 0.5
    assert tree["bf16"] == {"enabled": True, "check_grad_overflow": False}
    assert tree["communication_data_type"] == "fp32"
    assert tree["zero_optimization"]["stage"] == 2
    assert tree["zero_optimization"]["overlap_comm"] is True


def test_stage_1_overlaps_communication_only_without_accumulation():
    def overlaps(stage, accumulation):
        config = EngineConfig(zero_stage=stage)
        tree = deepspeed_config(config, precision="fp32", micro_batch=1, accumulation=accumulation, world_size=2)
        return tree["zero_optimization"]["overlap_comm"]

    assert [overlaps(stage, 1) for stage in range(4)] == [False, True, True, True]
    assert [overlaps(stage, 2) for stage in range(4)] == [False, False, True, True]


def test_deepspeed_itself_accepts_the_config():
    from deepspeed.runtime.config import DeepSpeedConfig

    for stage in (0, 1, 2, 3):
        tree = deepspeed_config(
            EngineConfig(zero_stage=stage), precision="fp32", micro_batch=2, accumulation=1, world_size=1
        )
        read = DeepSpeedConfig(tree)
        assert read.zero_optimization_stage == stage
        assert read.gradient_clipping == 1.0


def test_an_extra_key_may_not_hide_one_of_ours():
    with pytest.raises(ConfigError, match=r"engine\.extra: gradient_clipping already set"):
        deepspeed_config(
            EngineConfig(extra={"gradient_clipping": 2}), precision="fp32", micro_batch=1, accumulation=1, world_size=1
        )


def test_a_rank_count_that_does_not_divide_lists_the_legal_ones():
    config = PretrainConfig(
        store="s", run_dir="r", steps=1, global_batch=12, micro_batch=2, crop_voxels=(8, 8, 8), patch_voxels=(4, 4, 4)
    )
    assert accumulation(config, 3) == 2
    with pytest.raises(ConfigError, match="among 4 ranks; legal rank counts are 1, 2, 3, 6"):
        accumulation(config, 4)
