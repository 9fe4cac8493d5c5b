"""Recipes: YAML + `key=value` -> frozen dataclasses, all mistakes at once.

A RECIPE on the command line is a path or the name of a packaged recipe (`mimscale recipes`). Each stage keeps its
dataclasses in its own torch-free `config.py`; a rule that a value must obey stands in the class that owns the value.
"""

import argparse
import dataclasses
import difflib
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from mimscale.errors import ConfigError

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but `1e-4` is a number, as everybody who writes a learning rate expects."""


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that `_Loader` would take for such a number."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


def load_config(cls: type[T], recipe: str | None, overrides: Sequence[str] = ()) -> T:
    """Read a recipe, apply `key=value` overrides and build the frozen dataclass `cls`.

    Args:
        cls: the dataclass at the top of the verb's config.
        recipe: a path, a packaged name, or None for overrides on the defaults alone.
        overrides: `a.b=value`; the value is YAML (`[96, 96, 96]`, `1e-4`, `null`).

    Raises:
        ConfigError: naming every wrong field with its full key, or an unknown recipe with the known ones.
    """
    origin = "command line" if recipe is None else recipe
    tree = {} if recipe is None else parse_yaml(recipe_text(recipe), origin)
    for override in overrides:
        apply_override(tree, override)
    return build_config(cls, tree, origin)


def build_config(cls: type[T], tree: dict[str, Any], origin: str) -> T:
    """Build `cls` from a plain tree; `origin` is what an error calls it.

    Where a value decides which further keys there are, the class has a `variant` for a tree: the subclass with them.

    Raises:
        ConfigError: naming every wrong field with its full key.
    """
    variant = getattr(cls, "variant", None)
    if variant is not None:
        cls = variant(tree)
    try:
        config: T = _adapter_of(cls).validate_python(tree, extra="forbid")
        return config
    except ValidationError as error:
        items = error.errors()
        problems = [_problem(cls, item) for item in items]
        parents = dict.fromkeys(item["loc"][:-1] for item in items if item["type"] == UNKNOWN_KEY)
        known = [f"keys {_at(loc)}: {', '.join(_keys_below(cls, loc))}" for loc in parents]
        raise ConfigError("\n  ".join([f"{origin}: {len(problems)} problem(s)", *problems, *known])) from None


_adapters: dict[Any, TypeAdapter[Any]] = {}  # building one takes far longer than using it


def _adapter_of(cls: Any) -> TypeAdapter[Any]:
    if cls not in _adapters:
        _adapters[cls] = TypeAdapter(cls)
    return _adapters[cls]


UNKNOWN_KEY = "unexpected_keyword_argument"  # pydantic's name for it


def _problem(cls: Any, item: Any) -> str:
    """One mistake in words; `item` is one of pydantic's `errors()`."""
    *parents, last = item["loc"] or ("(top level)",)
    key = ".".join(map(str, (*parents, last)))
    if item["type"] == "value_error":  # a rule of ours, which names its value
        return f"{key}: {item['ctx']['error']}"
    if item["type"] == "missing":
        return f"{key}: missing; write it into the recipe, or give {key}=VALUE"
    if item["type"] == UNKNOWN_KEY:
        close = difflib.get_close_matches(str(last), _keys_below(cls, parents), n=1)
        meant = f"; did you mean {'.'.join([*map(str, parents), *close])}?" if close else ""
        return f"{key}: no such key, got {item['input']!r:.80}{meant}"
    return f"{key}: {item['msg']}, got {item['input']!r:.80}"


def _at(loc: Sequence[Any]) -> str:
    return f"of {'.'.join(map(str, loc))}" if loc else "at the top"


def _keys_below(cls: Any, parents: Sequence[Any]) -> list[str]:
    """Field names of the config that stands at a key path; none where several kinds of value may stand."""
    for parent in parents:
        if get_origin(cls) is dict:
            kind = get_args(cls)[1]
        else:
            kind = get_type_hints(cls).get(str(parent)) if dataclasses.is_dataclass(cls) else None
        choices = (kind, *get_args(kind)) if get_origin(kind) is not dict else (kind,)
        cls = next((one for one in choices if dataclasses.is_dataclass(one) or get_origin(one) is dict), None)
    return [field.name for field in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []


def config_tree(config: Any) -> dict[str, Any]:
    """A config as plain dictionaries, lists, numbers and text: what `config.yaml` holds."""
    tree = _adapter_of(type(config)).dump_python(config, mode="json")
    assert isinstance(tree, dict)
    return tree


def config_yaml(config: Any) -> str:
    """A resolved config as YAML that `load_config` reads back to an equal config."""
    return tree_yaml(config_tree(config))


def tree_yaml(tree: dict[str, Any]) -> str:
    """A plain tree as YAML that `parse_yaml` reads back to the same values."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120)


def tree_hash(tree: Any) -> str:
    """First 16 hex digits of the sha256 of a plain tree, independent of key order."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def parse_yaml(text: str, origin: str) -> dict[str, Any]:
    """Parse a YAML mapping.

    Raises:
        ConfigError: broken YAML, or something else than a mapping at the top.
    """
    try:
        tree = yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader with one more number format)
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: not valid YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{origin}: expected `key: value` lines at the top, got {type(tree).__name__}")
    return tree


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one `a.b=value` in a plain tree.

    Raises:
        ConfigError: it is no override, or a value stands where a key below it is meant.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r}: an override is written key=value, for example optim.lr=1e-4")
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506
    except yaml.YAMLError:
        value = text  # a glob such as *.nii.gz is no YAML, and means itself
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{override!r}: {parent} holds {child!r}, which has no field below it")
        node = child
    node[last] = value


def differing_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Lines `key: old -> new` for every leaf in which two trees differ."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        left, right, name = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(left, dict) and isinstance(right, dict):
            lines += differing_keys(left, right, f"{name}.")
        elif left != right:
            lines.append(f"{name}: {left!r} -> {right!r}")
    return lines


def recipe_names() -> dict[str, str]:
    """Packaged recipes: name -> its one-line description (the first comment of the file)."""
    root = resources.files("mimscale") / "recipes"
    names: dict[str, str] = {}

    def visit(folder: Any, prefix: str) -> None:
        for entry in folder.iterdir():
            if entry.is_dir():
                visit(entry, f"{prefix}{entry.name}/")
            elif entry.name.endswith(".yaml"):
                first_line = entry.read_text().splitlines()[0]
                names[prefix + entry.name.removesuffix(".yaml")] = first_line.removeprefix("#").strip()

    visit(root, "")
    return dict(sorted(names.items()))


def recipe_text(recipe: str) -> str:
    """The YAML of a path or of a packaged recipe.

    Raises:
        ConfigError: neither exists; the packaged names are listed.
    """
    path = Path(recipe)
    if path.is_file():
        return path.read_text()
    if recipe in recipe_names():
        return (resources.files("mimscale") / "recipes" / f"{recipe}.yaml").read_text()
    raise ConfigError(f"{recipe}: no such file and no packaged recipe; packaged are: {', '.join(recipe_names())}")


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Positional words and `key=value` overrides of a command line, each in order.

    After its first dot a key may hold what names have: `arms.mae, trained positions.note=...`.
    """
    overrides = [word for word in arguments if re.match(r"^[A-Za-z_]\w*(\.[^=/]+)?=", word)]
    return [word for word in arguments if word not in overrides], overrides


def verb_parser(verb: str, description: str) -> argparse.ArgumentParser:
    """The command line of a verb: positional words, `key=value`, and the flags that the verb adds."""
    parser = argparse.ArgumentParser(prog=f"mimscale {verb}", description=description)
    parser.add_argument("words", nargs="*", metavar="WORD", help="positional words and key=value overrides")
    return parser


def load_verb_config(cls: type[T], words: Sequence[str], *, needs_recipe: bool) -> T:
    """The config of a verb whose command line is `[RECIPE] key=value ...`.

    Raises:
        ConfigError: the recipe is missing or there is more than one positional word.
    """
    positional, overrides = split_arguments(words)
    if len(positional) > 1 or (needs_recipe and not positional):
        raise ConfigError(f"expected one RECIPE and key=value overrides, got {positional}; see `mimscale recipes`")
    return load_config(cls, positional[0] if positional else None, overrides)


def recipes_main(argv: list[str]) -> int:
    """`mimscale recipes [NAME]`: list the packaged recipes, or print one."""
    parser = argparse.ArgumentParser(prog="mimscale recipes", description="List the packaged recipes, or print one.")
    parser.add_argument("name", nargs="?", help="the recipe to print")
    parser.add_argument("--json", action="store_true", help="names and descriptions as JSON")
    arguments = parser.parse_args(argv)
    if arguments.name:
        sys.stdout.write(recipe_text(arguments.name))
    elif arguments.json:
        print(json.dumps(recipe_names()))
    else:
        width = max(map(len, recipe_names()))
        for name, line in recipe_names().items():
            print(f"{name:<{width}}  {line}")
    return 0


def require_positive(owner: str, **values: float | Sequence[float]) -> None:
    """Raise ValueError, naming `owner.field=value`, unless every number is above zero."""
    for name, value in values.items():
        numbers = value if isinstance(value, Sequence) else (value,)
        if any(not number > 0 for number in numbers):
            raise ValueError(f"{owner}.{name}={value}: must be above 0")


def is_config(value: object) -> bool:
    """True for an instance of a config dataclass."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)
