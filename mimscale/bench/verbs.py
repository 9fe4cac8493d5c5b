"""`mimscale bench KIND ...`: a table of what can be measured, each imported only when it is asked for."""

import importlib
import sys
from collections.abc import Sequence

from mimscale.bench.results import Windows, add_outputs, folder_of
from mimscale.config import config_yaml, load_verb_config, parse_yaml, recipe_text, split_arguments, verb_parser
from mimscale.errors import ConfigError
from mimscale.train.config import PretrainConfig

# kind -> (module:function, one line). The function takes the words behind the kind.
KINDS: dict[str, tuple[str, str]] = {
    "stream": ("mimscale.bench.stream:main", "crops a second out of a store, on one core and through the loader"),
    "step": ("mimscale.bench.step:main", "the training step alone, against the time of its matrix products"),
    "train": ("mimscale.bench.verbs:train_main", "synthetic batch, loader alone, and both: on one rank or many"),
    "checkpoint": ("mimscale.bench.checkpoint:main", "how long a save stops training, and how fast it is read"),
    "ingest": ("mimscale.bench.ingest:main", "volumes a second into a store, on one core"),
    "scaling": ("mimscale.bench.scaling:main", "1, 2, 4 ... ranks: efficiency and memory; or a table of such runs"),
    "memory": ("mimscale.bench.memory:main", "what weights and optimizer take on a rank, by ZeRO stage"),
    "simulate": ("mimscale.bench.simulate:main", "what grows with ranks and volumes, up to thousands, in one process"),
    "compare": ("mimscale.bench.compare:main", "two results; exit code 1 where B is slower beyond the spread"),
}


def usage() -> str:
    """The text of `mimscale bench --help`."""
    width = max(map(len, KINDS))
    lines = [f"  {kind:<{width}}  {line}" for kind, (_, line) in KINDS.items()]
    return (
        "usage: mimscale bench KIND RECIPE [key=value ...] [--json] [--out FOLDER] [--help]\n"
        "       mimscale bench memory RECIPE [key=value ...] --out FILE [--stages N ...]\n"
        "       mimscale bench simulate [--nodes N] [--volumes N] [--json] [--out FOLDER]\n"
        "       mimscale bench compare A.json B.json\n\nkinds:\n" + "\n".join(lines) + "\n"
    )


def main(argv: list[str]) -> int:
    """`mimscale bench KIND ...`; returns the exit code of what it calls."""
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(usage())
        return 0
    kind, *words = argv
    if kind not in KINDS:
        raise ConfigError(f"bench {kind}: no such benchmark; there are: {', '.join(KINDS)}")
    module, function = KINDS[kind][0].split(":")
    code = getattr(importlib.import_module(module), function)([kind, *words] if kind == "stream" else words)
    assert isinstance(code, int), f"{module}:{function} returned {code!r} instead of an exit code"
    return code


def train_main(argv: list[str]) -> int:
    """`mimscale bench train RECIPE [store=STORE] [key=value ...]`, alone, under torchrun or in a job.

    With a run directory the result lies there. Torch comes in behind `--check`, with which a login node looks at a job.
    """
    parser = verb_parser(
        "bench train",
        "Training in three modes: a batch on the device, the loader alone, and both. Without store=STORE there is "
        "nothing to load, and only the first is measured.",
    )
    parser.add_argument("--steps", type=int, default=20, help="of a window")
    parser.add_argument("--warmup", type=int, default=5, help="steps before the first window")
    parser.add_argument("--windows", type=int, default=3, help="of which median and spread are told")
    parser.add_argument("--channels", type=int, default=1, help="of the images, where no store tells it")
    parser.add_argument("--check", action="store_true", help="print the resolved config and leave")
    add_outputs(parser)
    arguments = parser.parse_intermixed_args(argv)
    config = bench_config(arguments.words, needs_store=False)
    windows = Windows(arguments.warmup, arguments.steps, arguments.windows)
    if arguments.check:
        print(config_yaml(config), end="")
        return 0
    from mimscale.bench.training import run_training

    folder = folder_of(arguments.out, config.run_dir)
    return run_training(config, windows, channels=arguments.channels, as_json=arguments.json, folder=folder)


def bench_config(words: Sequence[str], *, needs_store: bool = True) -> PretrainConfig:
    """The config of a benchmark of training. A run directory may be left out, and a store where none is needed.

    Raises:
        ConfigError: no recipe, or a wrong or missing field.
    """
    positional, overrides = split_arguments(words)
    given = {word.partition("=")[0] for word in overrides}
    if positional:
        given |= parse_yaml(recipe_text(positional[0]), positional[0]).keys()
    may_miss = ["run_dir"] if needs_store else ["run_dir", "store"]
    words = [*words, *(f"{key}=none" for key in may_miss if key not in given)]
    return load_verb_config(PretrainConfig, words, needs_recipe=True)
