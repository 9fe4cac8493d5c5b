import copy
import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from mimscale.errors import ConfigError
from mimscale.train.config import EngineConfig, OptimConfig, PretrainConfig, accumulation
from mimscale.train.deepspeed_config import deepspeed_config
from mimscale.train.optim import adamw, group_rate, learning_rate, lr_scale, parameter_groups, stage_at, stages


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
        EngineConfig(zero_stage=2, clip_grad_norm=0.5),
        precision="bf16",
        micro_batch=3,
        accumulation=4,
        world_size=2,
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


@pytest.mark.parametrize(
    ("stage", "world_size", "precision", "alone"),
    [(1, 1, "fp32", True), (1, 2, "fp32", False), (1, 1, "bf16", False), (2, 1, "fp32", False)],
)
def test_on_one_rank_in_fp32_stage_1_copies_no_gradient_into_a_bucket(stage, world_size, precision, alone):
    zero = deepspeed_config(
        EngineConfig(zero_stage=stage),
        precision=precision,
        micro_batch=1,
        accumulation=1,
        world_size=world_size,
    )["zero_optimization"]
    assert (zero["contiguous_gradients"], zero["overlap_comm"]) == (not alone, not alone)
    assert (zero["reduce_bucket_size"] < EngineConfig().bucket_elements) == alone


def test_deepspeed_itself_accepts_the_config():
    from deepspeed.runtime.config import DeepSpeedConfig

    for stage in (0, 1, 2, 3):
        tree = deepspeed_config(
            EngineConfig(zero_stage=stage),
            precision="fp32",
            micro_batch=2,
            accumulation=1,
            world_size=1,
        )
        read = DeepSpeedConfig(tree)
        assert read.zero_optimization_stage == stage
        assert read.gradient_clipping == (1.0 if stage else 0.0)  # of stage 0 the engine clips


def test_an_extra_key_may_not_hide_one_of_ours():
    with pytest.raises(ConfigError, match=r"engine\.extra: gradient_clipping already set"):
        deepspeed_config(
            EngineConfig(extra={"gradient_clipping": 2}),
            precision="fp32",
            micro_batch=1,
            accumulation=1,
            world_size=1,
        )


def test_a_rank_count_that_does_not_divide_lists_the_legal_ones():
    config = PretrainConfig(
        store="s", run_dir="r", steps=1, global_batch=12, micro_batch=2, crop_voxels=(8, 8, 8), patch_voxels=(4, 4, 4)
    )
    assert accumulation(config, 3) == 2
    with pytest.raises(ConfigError, match="among 4 ranks; legal rank counts are 1, 2, 3, 6"):
        accumulation(config, 4)


SCHEDULES = {
    "full": OptimConfig(schedule="full", lr=1.0, warmup_steps=4, min_lr_ratio=0.1),
    "low_peak": OptimConfig(schedule="low_peak", lr=1.0, warmup_steps=4, min_lr_ratio=0.1),
    "sawtooth": OptimConfig(schedule="sawtooth", lr=1.0, warmup_steps=5, head_steps=8, min_lr_ratio=0.1),
    "frozen": OptimConfig(schedule="frozen", lr=1.0, warmup_steps=4, min_lr_ratio=0.1),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [3, 8, 9, 40])
def test_the_stages_of_a_schedule_cover_every_step_once(name, steps):
    table = stages(SCHEDULES[name], steps)
    assert table[0].start == 0
    assert table[-1].stop == steps
    assert all(before.stop == after.start for before, after in itertools.pairwise(table))
    for step in range(steps):
        stage = stage_at(SCHEDULES[name], step, steps)
        assert stage.start <= step < stage.stop


def test_a_sawtooth_rises_and_falls_twice_and_its_boundaries_belong_to_the_later_stage():
    config = SCHEDULES["sawtooth"]
    rates = [learning_rate(config, step, 30) for step in range(31)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]  # the head alone rises for half of its 8 steps
    assert rates[4:8] == sorted(rates[4:8], reverse=True)
    assert rates[7] < 0.3
    assert rates[8:14] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])  # then all weights rise together
    assert rates[13:] == sorted(rates[13:], reverse=True)
    assert rates[30] == pytest.approx(0.1)
    assert [stage_at(config, step, 30).trains_encoder for step in (0, 7, 8, 29, 30)] == [False, False, True, True, True]


def test_each_schedule_gives_encoder_and_head_their_rates():
    def at(name, step):
        config = SCHEDULES[name]
        groups = [{"lr_scale": scale, "is_encoder": inside} for scale, inside in ((0.5, True), (2.0, False))]
        return [group_rate(group, config, step, 24) for group in groups]

    assert at("full", 4) == [0.5, 2.0]
    assert at("low_peak", 4) == pytest.approx([0.05, 0.2])
    assert at("sawtooth", 4) == [0.0, 2.0]
    assert at("sawtooth", 13) == [0.5, 2.0]
    assert at("frozen", 4) == [0.0, 2.0]


def test_a_schedule_without_a_head_stage_has_no_more_groups_than_it_needs():
    plain, sawtooth = (
        parameter_groups(Small(), OptimConfig(schedule=name, head_steps=steps), depth=1)
        for name, steps in (("full", 0), ("sawtooth", 3))
    )
    assert [group["is_encoder"] for group in plain] == [False] * 2
    assert sorted(group["is_encoder"] for group in sawtooth) == [False, False, True, True]
    inside = [group for group in sawtooth if group["is_encoder"]]
    assert sum(len(group["params"]) for group in inside) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": "sawtooth"}, "sawtooth needs steps of the head alone"),
        ({"head_steps": 3}, "optim.schedule=full with optim.head_steps=3"),
        ({"schedule": "frozen", "head_steps": 3}, "optim.schedule=frozen with optim.head_steps=3"),
    ],
)
def test_steps_of_the_head_alone_belong_to_a_sawtooth(change, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**change)


# Of each schedule: rates of a group of the encoder (half the rate) and of the head (twice) on both sides of every
# boundary. A stage of n steps after its warm-up ends at 0.1 + 0.9 (1 + cos(pi (n - 1) / n)) / 2 of its peak.
BOUNDARIES = {
    "full": {0: (0.125, 0.5), 3: (0.5, 2.0), 4: (0.5, 2.0), 14: (0.275, 1.1), 23: (0.05277, 0.21108), 24: (0.05, 0.2)},
    "low_peak": {0: (0.0125, 0.05), 3: (0.05, 0.2), 4: (0.05, 0.2), 14: (0.0275, 0.11), 24: (0.005, 0.02)},
    "frozen": {0: (0, 0.5), 3: (0, 2.0), 4: (0, 2.0), 14: (0, 1.1), 23: (0, 0.21108), 24: (0, 0.2)},
    "sawtooth": {
        0: (0, 0.5),
        3: (0, 2.0),
        4: (0, 2.0),
        7: (0, 0.46360),  # three quarters of the head's fall
        8: (0.1, 0.4),  # both rise from here
        12: (0.5, 2.0),
        13: (0.5, 2.0),
        23: (0.05911, 0.23646),  # ten elevenths of the fall
        24: (0.05, 0.2),
    },
}


@pytest.mark.parametrize("name", BOUNDARIES)
def test_encoder_and_head_have_their_rates_on_both_sides_of_every_boundary(name):
    groups = [{"lr_scale": scale, "is_encoder": inside} for scale, inside in ((0.5, True), (2.0, False))]
    for step, rates in BOUNDARIES[name].items():
        # A frozen encoder is in no group at all; its group would have no rate either.
        found = [group_rate(group, SCHEDULES[name], step, 24) for group in groups]
        assert found == pytest.approx(rates, abs=1e-5), step


def test_without_a_warm_up_the_first_step_has_the_peak():
    assert learning_rate(OptimConfig(lr=1.0), 0, 24) == 1.0


@pytest.mark.parametrize("layer_decay", [1.0, 0.75])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_cut_at_any_step_goes_on_to_the_same_bits_whatever_the_schedule(name, layer_decay):
    config = replace(SCHEDULES[name], layer_decay=layer_decay, head_lr_ratio=2.0)
    steps = 24

    def begin():
        torch.manual_seed(0)
        model = Small()
        model.encoder.requires_grad_(name != "frozen")
        return model, adamw(model, config, depth=1)

    def go_on(model, optimizer, first, last):
        ours = parameter_groups(model, config, depth=1)
        for step in range(first, last):
            for group, own in zip(optimizer.param_groups, ours, strict=True):
                group["lr"] = group_rate(own, config, step, steps)
            optimizer.zero_grad()
            noise = torch.randn(5, 2, generator=torch.Generator().manual_seed(step))
            (model.head(model.encoder(noise) + model.mask_token) ** 2).mean().backward()
            optimizer.step()
        return {key: value.clone() for key, value in model.state_dict().items()}

    start = {key: value.clone() for key, value in begin()[0].state_dict().items()}
    straight = go_on(*begin(), 0, steps)
    for cut in range(1, steps):
        first, optimizer = begin()
        saved = go_on(first, optimizer, 0, cut)
        model, resumed = begin()
        model.load_state_dict(saved)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        ended = go_on(model, resumed, cut, steps)
        assert all(torch.equal(ended[key], straight[key]) for key in straight), cut
        encoder_stays = name == "frozen" or (name == "sawtooth" and cut <= config.head_steps)
        assert torch.equal(saved["encoder.weight"], start["encoder.weight"]) == encoder_stays, cut
