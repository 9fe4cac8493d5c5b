"""The contract that lies beside weights, and what it may hold. No torch here.

It may come from anybody: a value of another type than ours is refused before code meets it.
"""

import json
from pathlib import Path
from typing import Any

from mimscale.errors import CheckpointError

WEIGHTS_FILE = "weights.safetensors"
CONTRACT_FILE = "contract.json"
CONTRACT_VERSION = 1


def read_contract(path: Path) -> dict[str, Any]:
    """The contract of weights in our own layout.

    Raises:
        CheckpointError: it cannot be read, is of another version or layout, or holds what no contract of ours holds.
    """
    try:
        contract = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); export the weights again") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); export the weights again") from None
    version = contract.get("contract_version") if isinstance(contract, dict) else None
    if version != CONTRACT_VERSION:
        raise CheckpointError(
            f"{path}: contract version {version}, this mimscale reads version {CONTRACT_VERSION}; "
            "export the weights again with this version"
        )
    assert isinstance(contract, dict)
    if contract.get("layout") is not None:
        raise CheckpointError(
            f"{path}: these weights are laid out for {contract['layout']}; take those of the run, or bring them back "
            f"with `mimscale export --from-monai {path.with_name(WEIGHTS_FILE)} out/ heads=N ...`"
        )
    if (problem := _why_not_ours(contract)) is not None:
        raise CheckpointError(f"{path}: {problem}; mimscale wrote no such contract, export the weights again")
    return contract


def _why_not_ours(contract: dict[str, Any]) -> str | None:
    """What cannot be in a contract of ours: a file from elsewhere must not reach code that expects other types."""
    for key, value in contract.items():
        if key in ("crop_voxels", "patch_voxels"):
            right = isinstance(value, list) and len(value) == 3 and all(_is_count(edge, 1) for edge in value)
        elif key in ("channels", "step"):
            right = _is_count(value, 1 if key == "channels" else 0)
        elif key in ("model", "mae", "unetr", "intensity", "recipe"):
            right = isinstance(value, dict) or (key == "intensity" and value is None)
        elif key in ("class_names", "datasets"):
            item = str if key == "class_names" else dict
            right = value is None or (isinstance(value, list) and all(isinstance(entry, item) for entry in value))
        else:
            right = value is None or isinstance(value, str | int | float | list | dict)
        if not right:
            return f"{key}={value!r:.60} is of another type than it must be"
    return None


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
