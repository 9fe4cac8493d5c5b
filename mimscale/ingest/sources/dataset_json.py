"""The dataset.json that Decathlon and nnU-Net folders carry. It is data: nothing of it is executed."""

import json
from pathlib import Path
from typing import Any

from mimscale import durable
from mimscale.errors import DataError


def read(path: Path) -> dict[str, Any]:
    """The object of a dataset.json.

    Raises:
        DataError: it cannot be read, or is no JSON object.
    """
    with durable.explained(DataError, path, "give the dataset.json of a Decathlon or nnU-Net data set"):
        text = path.read_bytes()
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:  # the text of a JSONDecodeError holds a position, no value
        raise DataError(f"{path}: not valid JSON ({type(error).__name__}: {error})") from None
    if not isinstance(tree, dict):
        raise DataError(f"{path}: not a dataset.json: it holds a {type(tree).__name__}, not an object")
    return tree


def channel_names(path: Path, tree: dict[str, Any]) -> tuple[str, ...]:
    """Names of channel 0, 1, ...: `channel_names`, or `modality` in Decathlon's and older nnU-Net's words.

    Raises:
        DataError: the numbers do not run 0, 1, 2, ...
    """
    key = "channel_names" if "channel_names" in tree else "modality"
    named = tree.get(key) or {}
    if not isinstance(named, dict):
        raise DataError(f'{path}: {key} must be {{"0": "CT", ...}}, not a {type(named).__name__}')
    return _in_order(path, key, {number: str(name) for number, name in named.items()})


def class_names(path: Path, tree: dict[str, Any]) -> tuple[str, ...]:
    """Names of label value 0, 1, ... from {"0": "background"} or {"background": 0, "tumour": [1, 2]}.

    Of a value that only stands in lists (nnU-Net's regions) the smallest region that holds it gives the name. The
    value named `ignore` is no class.

    Raises:
        DataError: the values do not run 0, 1, 2, ...
    """
    labels = tree.get("labels") or {}
    if not isinstance(labels, dict):
        raise DataError(f'{path}: labels must be {{"background": 0, ...}}, not a {type(labels).__name__}')
    if all(not _is_number(key) for key in labels):
        labels = _by_value(path, labels)
    return _in_order(path, "labels", {value: str(name) for value, name in labels.items()})


def ignore_value(tree: dict[str, Any]) -> int | None:
    """The label value that nnU-Net's `ignore` has, where there is one."""
    labels = tree.get("labels")
    value = labels.get("ignore") if isinstance(labels, dict) else None
    return value if isinstance(value, int) else None


def _by_value(path: Path, labels: dict[str, Any]) -> dict[Any, str]:
    regions = {name: value if isinstance(value, list) else [value] for name, value in labels.items()}
    named: dict[Any, str] = {}
    for name, values in sorted(regions.items(), key=lambda item: len(item[1])):
        if name == "ignore":
            continue
        for value in values:
            if not isinstance(value, int):
                raise DataError(f"{path}: labels: the values of {name} must be whole numbers")
            if value not in named:
                named[value] = name if name not in named.values() else f"{name} {value}"
    return named


def _in_order(path: Path, key: str, named: dict[Any, str]) -> tuple[str, ...]:
    if not all(_is_number(number) for number in named):
        raise DataError(f"{path}: {key}: the numbers {sorted(map(str, named))[:5]} must be whole")
    numbered = {int(number): name for number, name in named.items()}
    if sorted(numbered) != list(range(len(named))):
        raise DataError(f"{path}: {key} {sorted(numbered)} must run 0, 1, 2, ... without a gap")
    return tuple(numbered[number] for number in range(len(numbered)))


def _is_number(key: Any) -> bool:
    return str(key).strip().isdecimal()
