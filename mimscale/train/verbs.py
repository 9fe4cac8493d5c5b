"""The command lines of `pretrain` and `finetune`. Torch comes in only when training starts, so `--check` is instant."""

import argparse
import sys

from mimscale.config import config_yaml, load_verb_config, verb_parser
from mimscale.errors import ConfigError
from mimscale.models.config import patch_grid
from mimscale.stream.select import parse_attribute, parse_filter
from mimscale.train.config import FinetuneConfig, PretrainConfig, RunConfig


def pretrain_main(argv: list[str]) -> int:
    """`mimscale pretrain RECIPE store=STORE run_dir=DIR [key=value ...]`."""
    parser = verb_parser(
        "pretrain", "Train an encoder without labels, by the recipe's method. An existing run_dir continues."
    )
    _add_flags(parser)
    arguments = parser.parse_intermixed_args(argv)
    config = load_verb_config(PretrainConfig, arguments.words, needs_recipe=True)
    check_run(config)
    if arguments.check:
        sys.stdout.write(config_yaml(config))
        return 0
    from mimscale.train.session import session_main

    return session_main(
        config,
        config.network.objective(config),
        fresh=arguments.fresh,
        fresh_data=arguments.fresh_data,
        as_json=arguments.json,
    )


def finetune_main(argv: list[str]) -> int:
    """`mimscale finetune RECIPE store=STORE run_dir=DIR [init_from=RUN_DIR] [key=value ...]`."""
    parser = verb_parser("finetune", "Train a segmentation, from a pretrained encoder or from scratch.")
    _add_flags(parser)
    arguments = parser.parse_intermixed_args(argv)
    config = load_verb_config(FinetuneConfig, arguments.words, needs_recipe=True)
    check_run(config)
    if arguments.check:
        sys.stdout.write(config_yaml(config))
        return 0
    from mimscale.train.session import session_main

    return session_main(
        config,
        config.network.objective(config),
        fresh=arguments.fresh,
        fresh_data=arguments.fresh_data,
        as_json=arguments.json,
    )


def check_run(config: RunConfig) -> None:
    """The rules between the parts of a config, all of them before anything is started.

    Raises:
        ConfigError: crop, patch and mask do not fit each other, or the method or head cannot be built for them.
    """
    problems = []
    try:
        patch_grid(config.crop_voxels, config.patch_voxels)
    except ValueError as error:
        problems.append(str(error))
    problems += _stream_problems(config)
    if isinstance(config, PretrainConfig) and config.optim.schedule != "full":
        problems.append(f"optim.schedule={config.optim.schedule}: is for fine-tuning; pretraining trains all weights")
    if config.engine.compile_blocks and not config.model.compiles:
        problems.append(
            f"engine.compile_blocks=true: blocks of {type(config.model).__name__.removesuffix('Config')} are not "
            "compiled, only those of a ViT or a residual encoder; set it to false"
        )
    problems += config.network.problems(config)
    if problems:
        raise ConfigError("\n".join(problems))


def _stream_problems(config: RunConfig) -> list[str]:
    stream = config.stream
    problems = []
    try:
        if stream.filter is not None:
            parse_filter(stream.filter)
        if stream.weights is not None:
            parse_attribute(stream.weights.by, "stream.weights.by")
    except ConfigError as error:
        problems.append(str(error))
    region = stream.region_voxels
    if region is not None and any(edge < crop for edge, crop in zip(region, config.crop_voxels, strict=True)):
        problems.append(f"stream.region_voxels={region}: must hold a crop of crop_voxels={config.crop_voxels}")
    if stream.origins == "labelled" and not isinstance(config, FinetuneConfig):
        problems.append("stream.origins=labelled: only fine-tuning reads labels; use occupied")
    return problems


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="print the resolved config and leave")
    parser.add_argument("--fresh", action="store_true", help="move an existing run aside and start over")
    parser.add_argument("--fresh-data", action="store_true", help="continue although the data or their order changed")
    parser.add_argument("--json", action="store_true", help="final metrics as JSON on stdout")
