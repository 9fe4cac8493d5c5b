"""Fakes of pretrain, finetune and evaluate without torch: they note that they were started, and write what is read.

FAKE_STARTS names a file that gets a line for each start. While the file that FAKE_WAIT names does not exist, a
fine-tuning waits. A learning rate above 1 diverges. Pretraining takes twice as long where fewer patches are hidden.
"""

import os
import sys
import time
from pathlib import Path

from fake_runs import add_segmentation_scores, write_lines

from mimscale import cli
from mimscale.config import load_verb_config
from mimscale.errors import DataError
from mimscale.evaluate.config import EvaluateConfig
from mimscale.train.config import FinetuneConfig, PretrainConfig
from mimscale.train.run_dir import Outcome, RunDir

SITECUSTOMIZE = """
from mimscale import cli
for verb in ("pretrain", "finetune", "evaluate"):
    cli.VERBS[verb] = (f"study_fake_verbs:{verb}", "a fake")
"""


def install(folder: Path) -> dict[str, str]:
    """Variables of a shell in which `python -m mimscale.cli` has these verbs."""
    (folder / "site").mkdir(parents=True)
    (folder / "site" / "sitecustomize.py").write_text(SITECUSTOMIZE)
    paths = (folder / "site", Path(__file__).parent, Path(__file__).parents[1])
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "FAKE_STARTS": str(folder / "starts.txt"),
        "DS_ACCELERATOR": "cpu",
    }


def starts(folder: Path) -> dict[str, int]:
    """Node -> how often it was started."""
    file = folder / "starts.txt"
    found: dict[str, int] = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        found[line] = found.get(line, 0) + 1
    return found


def _note(verb: str, run_dir: Path) -> None:
    with Path(os.environ["FAKE_STARTS"]).open("a") as file:
        file.write(f"{verb} {run_dir.name}\n")


def _train(config: PretrainConfig | FinetuneConfig) -> int:
    run = RunDir(config.run_dir)
    _note(config.kind, run.path)
    if config.optim.lr > 1:
        raise DataError("loss is not finite at step 3; lower optim.lr")
    while config.kind == "finetune" and "FAKE_WAIT" in os.environ and not Path(os.environ["FAKE_WAIT"]).exists():
        time.sleep(0.05)
    step_s = 0.2 if isinstance(config, PretrainConfig) and config.mask.ratio < 0.75 else 0.1
    lines = [
        {"step": step, "loss": 1 / step, "step_s": step_s, "data_wait_s": 0.0, "samples_per_s": 20.0}
        for step in range(1, config.steps + 1)
    ]
    if config.kind == "finetune":
        gain = 0.1 if config.init_from else 0.08  # pretrained arms learn sooner
        lines += [{"step": step, "val_loss": 0.5, "val_dice": gain * step} for step in range(2, config.steps + 1, 2)]
    write_lines(run.metrics, lines)
    run.write_outcome(Outcome(outcome="finished", exit_code=0, step=config.steps))
    return 0


def pretrain(argv: list[str]) -> int:
    """What stands in for `mimscale pretrain`."""
    return _train(load_verb_config(PretrainConfig, argv, needs_recipe=True))


def finetune(argv: list[str]) -> int:
    """What stands in for `mimscale finetune`."""
    return _train(load_verb_config(FinetuneConfig, argv, needs_recipe=True))


def evaluate(argv: list[str]) -> int:
    """What stands in for `mimscale evaluate`: pretrained runs are a little better."""
    config = load_verb_config(EvaluateConfig, argv, needs_recipe=True)
    _note("evaluate", config.run_dir)
    pretrained = RunDir(config.run_dir).read_config_tree()["init_from"]
    (config.run_dir / "evaluate").mkdir(exist_ok=True)
    add_segmentation_scores(config.run_dir, dice=0.75 if pretrained else 0.5)
    return 0


if __name__ == "__main__":
    sys.exit(cli.main())
