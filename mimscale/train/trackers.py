"""Where a run's numbers are drawn while it trains: TensorBoard, and Weights & Biases when a recipe asks for it.

Both continue under the same name when a job is requeued. They hear what metrics.jsonl says and nothing else: no host
name, no path, no source code.
"""

import importlib.util
import re
import secrets
from pathlib import Path
from typing import Any, Protocol

from mimscale import durable
from mimscale.errors import LaunchError
from mimscale.train.config import WandbConfig
from mimscale.train.run_dir import RunDir

# Keys of a config that name places, which may hold a patient's or a colleague's name, or say what a table holds.
PRIVATE_KEYS = frozenset({"store", "run_dir", "init_from", "stage_dir", "table", "journal", "table_hash"})


class Tracker(Protocol):
    """Something that draws curves."""

    def add(self, step: int, values: dict[str, float]) -> None:
        """Hand over the numbers of a step.

        Raises:
            OSError: it writes to a full disk.
        """

    def close(self) -> None:
        """Write what is still in memory."""


class TensorBoard:
    """Event files. Those of steps that a continued run repeats are purged."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)

    def add(self, step: int, values: dict[str, float]) -> None:
        """One scalar a value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush the file."""
        self._writer.close()


class WeightsAndBiases:
    """One W&B run for all jobs of a run directory; its id lies in `wandb/id.txt`.

    Args:
        run: where its files go.
        config: project and mode.

    Raises:
        LaunchError: wandb is not installed, or its server cannot be reached in time.
    """

    def __init__(self, run: RunDir, config: WandbConfig) -> None:
        require_wandb()
        import wandb

        settings = wandb.Settings(
            console="off", disable_git=True, disable_code=True, disable_job_creation=True, save_code=False, silent=True,
            x_disable_meta=True, x_disable_stats=True, host="", program="",
        )  # fmt: skip
        try:
            self._run: Any = wandb.init(
                project=config.project,
                entity=config.entity,
                id=_kept_id(run.wandb / "id.txt"),
                resume="allow",
                name=config.name or run.path.name,
                dir=run.path,
                mode=config.mode,
                config=without_places(run.read_config_tree()),
                settings=settings,
            )
        except wandb.Error as error:
            raise LaunchError(
                f"meter.wandb: {error}; on a node without a way out set meter.wandb.mode=offline and send the run "
                f"later with `wandb sync {run.wandb}/offline-run-*`"
            ) from None
        # A step that is repeated after a kill has its x twice; W&B's own counter only ever grows.
        self._run.define_metric("*", step_metric="step")

    def add(self, step: int, values: dict[str, float]) -> None:
        """One point of each curve."""
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """Send or write the rest."""
        self._run.finish()


def require_wandb() -> None:
    """Raise LaunchError when the package is missing."""
    if importlib.util.find_spec("wandb") is None:
        raise LaunchError("meter.wandb is set, but wandb is not installed: pip install 'mimscale[wandb]'")


def without_places(tree: Any) -> Any:
    """A config tree less the keys that hold paths."""
    if not isinstance(tree, dict):
        return tree
    return {key: without_places(value) for key, value in tree.items() if key not in PRIVATE_KEYS}


def _kept_id(file: Path) -> str:
    if not file.exists():
        durable.write_text(file, secrets.token_hex(4))
    text = file.read_text()
    if not re.fullmatch(r"[0-9a-f]{8}", text):
        raise LaunchError(f"{file}: holds {text[:40]!r}, which is no id; remove it to begin a new W&B run")
    return text
