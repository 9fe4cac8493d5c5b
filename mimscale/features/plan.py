"""What all tasks of an extraction agree on, kept in `plan.json`: whichever task comes first writes it.

So a checkpoint that a run commits between the starts of two tasks changes nothing, and tasks that were given other
settings, another store or other weights are refused. A part holds volumes that follow each other by id, whatever the
number of tasks.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mimscale import durable
from mimscale.config import config_tree, differing_keys
from mimscale.errors import ConfigError, DataError
from mimscale.features.config import OUTSIDE_PLAN, ExtractConfig
from mimscale.features.layout import VERSION, WAY_OUT, FeatureFolder

MAY_MOVE = ("run", "store")  # paths: weights and store are told apart by their hashes


def settings_of(config: ExtractConfig) -> dict[str, Any]:
    """The part of the config that decides what is computed."""
    return {name: value for name, value in config_tree(config).items() if name not in OUTSIDE_PLAN}


def ids_hash(ids: Sequence[str]) -> str:
    """16 hex digits of the volumes that are planned."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]


def read_plan(folder: FeatureFolder) -> dict[str, Any] | None:
    """The plan, or None before a task has made it.

    Raises:
        DataError: it is damaged, or of another version.
    """
    try:
        plan = json.loads(folder.plan.read_text())
        version = plan["version"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder.plan}: damaged ({error}); choose another out, or remove {folder.path}") from None
    if version != VERSION:
        raise DataError(f"{folder.plan}: version {version}, this mimscale continues {VERSION}; choose another out")
    assert isinstance(plan, dict)
    return plan


def first_plan(folder: FeatureFolder, plan: dict[str, Any]) -> dict[str, Any]:
    """Make `plan` the plan, unless there is one; returns the one that counts, which may differ.

    Raises:
        ConfigError: the folder holds something else.
        DataError: the disk is full or not writable.
    """
    if not folder.plan.exists():
        strangers = sorted(
            entry.name for entry in folder.path.iterdir() if ".lock" not in entry.name and not _is_leftover(entry)
        )
        # Another task may have begun to write since; then there is a plan by now.
        if strangers and not folder.plan.exists():
            raise ConfigError(
                f"{folder.path}: no features, and not empty (it holds {strangers[0]}); choose another out"
            )
        _write_first(folder.plan, json.dumps(plan, indent=2, sort_keys=True) + "\n")
    there = read_plan(folder)
    assert there is not None, "one was just written, or somebody else's is there"
    return there


def refuse_other(out: Path, there: dict[str, Any], plan: dict[str, Any]) -> None:
    """Raise ConfigError where a plan says something else than the one in `out`; keys that only one has are passed."""
    shared = there.keys() & plan.keys() - set(MAY_MOVE)
    lines = differing_keys({key: there[key] for key in shared}, {key: plan[key] for key in shared})
    if lines:
        raise ConfigError(
            f"{out}: its features are of other weights, volumes or settings:\n  "
            + "\n  ".join(lines)
            + "\nchoose another out, or go back to these values"
        )


def _is_leftover(path: Path) -> bool:
    return path.name.startswith(durable.TEMPORARY_PREFIX)


def _write_first(path: Path, text: str) -> None:
    """Write a file that nobody has written before; of two that write at once, one's stays."""
    draft = path.with_name(f"{durable.TEMPORARY_PREFIX}{path.name}.{os.uname().nodename}.{os.getpid()}")
    with durable.explained(DataError, path, WAY_OUT):
        try:
            durable.write_text(draft, text)
            os.link(draft, path)
        except FileExistsError:
            pass
        finally:
            draft.unlink(missing_ok=True)
        durable.fsync_folder(path.parent)
