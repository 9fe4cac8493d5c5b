"""Which volumes a run draws from: a condition on the manifest's columns, written as in Python and never run as Python.

    modality == "ct" and spacing_mm[0] <= 3 and tags["site"] in ("A", "B") and "label" in overlays

A tag that a volume does not have reads as the empty text. Modalities compare without regard to case.
"""

import ast
import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mimscale.errors import ConfigError
from mimscale.store.manifest import Manifest
from mimscale.store.rows import SCHEMA
from mimscale.stream.config import StreamConfig

Kind = Literal["text", "number", "flag"]
Condition = Callable[[Manifest], NDArray[np.bool_]]  # -> [N]

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
}
_MOST_CHARACTERS = 2_000
_LARGEST_NUMBER = 1e300
_ALLOWED = (
    "a filter is made of columns, numbers, quoted text, == != < <= > >=, in, not in, and, or, not and parentheses"
)


@dataclass(frozen=True)
class Filter:
    """A checked condition."""

    text: str
    columns: frozenset[str]  # of the manifest that it reads
    condition: Condition

    def select(self, manifest: Manifest) -> NDArray[np.bool_]:
        """Which volumes fulfil it: [N].

        Raises:
            ConfigError: it asks for a tag that no volume has.
        """
        return self.condition(manifest)


def parse_filter(text: str, key: str = "stream.filter") -> Filter:
    """Read a filter; `key` is what an error calls it.

    Raises:
        ConfigError: broken syntax, something that is no filter, an unknown column, or a comparison of unlike kinds.
    """
    parser = _Parser(text, key)
    try:
        condition = parser.condition(parser.tree())
    except RecursionError:
        raise ConfigError(f"{key}={text}: nested too deeply") from None
    return Filter(text, frozenset(parser.columns), condition)


@dataclass(frozen=True)
class Attribute:
    """A text column, or one tag: what weights go by."""

    text: str
    columns: frozenset[str]
    values: Callable[[Manifest], Any]  # -> pa.Array of text [N]


def parse_attribute(text: str, key: str) -> Attribute:
    """Read the name of a text column, or of a tag: `modality`, `tags["site"]`.

    Raises:
        ConfigError: it is no such thing.
    """
    parser = _Parser(text, key)
    operand = parser.operand(parser.tree())
    if operand.column is None or operand.kind != "text":
        raise ConfigError(f'{key}={text}: must be a column of text or a tag, for example dataset or tags["site"]')
    return Attribute(text, frozenset(parser.columns), operand.values)


def refuse_mixed_spacings(manifest: Manifest, indices: NDArray[np.int64], config: StreamConfig) -> None:
    """Let nobody train on voxels of very different sizes without knowing.

    Raises:
        ConfigError: the spacings of these volumes differ by more than the config allows, and nothing resamples them.
    """
    if config.target_spacing_mm is not None or not len(indices):
        return
    spacing_mm = manifest.column("spacing_mm")[indices]
    low, high = spacing_mm.min(axis=0), spacing_mm.max(axis=0)
    if (high > config.max_spacing_ratio * low).any():
        ranges = ", ".join(f"{axis} {a:g} to {b:g}" for axis, a, b in zip("ZYX", low, high, strict=True))
        middle = ", ".join(f"{value:.3g}" for value in np.median(spacing_mm, axis=0))
        raise ConfigError(
            f"the selected volumes have spacings of {ranges} mm, more than stream.max_spacing_ratio="
            f"{config.max_spacing_ratio:g} apart: resample their crops with stream.target_spacing_mm=[{middle}] (their "
            "medians), leave some out with stream.filter, or raise the ratio to mix them as they are"
        )


@dataclass(frozen=True)
class _Operand:
    kind: Kind
    values: Callable[[Manifest], Any]  # -> pa.Array [N], or pa.Scalar of a constant
    column: str | None = None  # None for a constant


class _Parser:
    def __init__(self, text: str, key: str) -> None:
        self._text, self._key = text, key
        self.columns: set[str] = set()

    def tree(self) -> ast.expr:
        if len(self._text) > _MOST_CHARACTERS:
            raise self._error(f"has more than {_MOST_CHARACTERS} characters")
        try:
            return ast.parse(self._text.strip(), mode="eval").body
        except SyntaxError as error:
            raise self._error(f"{error.msg} at character {error.offset}; {_ALLOWED}") from None
        except (ValueError, RecursionError, MemoryError) as error:
            raise self._error(f"cannot be read ({error})") from None

    def condition(self, node: ast.expr) -> Condition:
        match node:
            case ast.BoolOp():
                parts = [self.condition(value) for value in node.values]
                join = np.logical_and if isinstance(node.op, ast.And) else np.logical_or
                return lambda manifest: join.reduce([part(manifest) for part in parts])
            case ast.UnaryOp(op=ast.Not()):
                inner = self.condition(node.operand)
                return lambda manifest: ~inner(manifest)
            case ast.Compare():
                parts = []
                left = node.left
                for operator, right in zip(node.ops, node.comparators, strict=True):
                    parts.append(self._comparison(left, operator, right))
                    left = right
                return lambda manifest: np.logical_and.reduce([part(manifest) for part in parts])
        operand = self.operand(node)
        if operand.column is None or operand.kind != "flag":
            raise self._error(f"{ast.unparse(node)} alone is no condition; compare it with something")
        return lambda manifest: _mask(operand.values(manifest))

    def _comparison(self, left: ast.expr, operator: ast.cmpop, right: ast.expr) -> Condition:
        if isinstance(operator, ast.In | ast.NotIn):
            inside = self._membership(left, right)
            return inside if isinstance(operator, ast.In) else lambda manifest: ~inside(manifest)
        if type(operator) not in _COMPARISONS:
            raise self._error(f"{ast.unparse(left)} ... {ast.unparse(right)}: {_ALLOWED}")
        compare = _COMPARISONS[type(operator)]
        first, second = self.operand(left), self.operand(right)
        shown = f"{ast.unparse(left)} and {ast.unparse(right)}"
        if first.column is None and second.column is None:
            raise self._error(f"compares {shown}, neither of which is a column")
        if first.kind != second.kind:
            raise self._error(f"compares {shown}: {first.kind} with {second.kind}")
        modality = "modality" in (first.column, second.column)

        def holds(manifest: Manifest) -> NDArray[np.bool_]:
            sides = (first.values(manifest), second.values(manifest))
            return _mask(compare(*(pc.utf8_lower(side) for side in sides) if modality else sides))

        return holds

    def _membership(self, left: ast.expr, right: ast.expr) -> Condition:
        operand = self.operand(left)
        if isinstance(right, ast.Name) and right.id in _sets():
            name, column = right.id, left
            self.columns.add(name)
            if not (isinstance(column, ast.Constant) and isinstance(column.value, str)):
                raise self._error(f"{ast.unparse(left)} in {name}: {name} holds names; write one, in quotes")
            wanted = column.value
            return lambda manifest: manifest.holds(name, wanted)
        if not isinstance(right, ast.List | ast.Tuple) or not right.elts:
            raise self._error(
                f"in {ast.unparse(right)}: must be a list of values in brackets, or one of {', '.join(_sets())}"
            )
        choices = [self.operand(element) for element in right.elts]
        if operand.column is None or any(choice.column is not None for choice in choices):
            raise self._error(f"{ast.unparse(left)} in {ast.unparse(right)}: must be a column in a list of constants")
        if any(choice.kind != operand.kind for choice in choices):
            raise self._error(f"looks for {ast.unparse(left)}, which is {operand.kind}, in {ast.unparse(right)}")
        equal = [self._comparison(left, ast.Eq(), element) for element in right.elts]
        return lambda manifest: np.logical_or.reduce([part(manifest) for part in equal])

    def operand(self, node: ast.expr) -> _Operand:
        match node:
            case ast.Constant(value=bool(constant)):
                return _constant("flag", constant)
            case ast.Constant(value=str(constant)):
                return _constant("text", constant)
            case ast.Constant(value=int(constant) | float(constant)):
                return self._number(constant)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(constant) | float(constant))) if not (
                isinstance(constant, bool)
            ):
                return self._number(-constant)
            case ast.Name(id=name):
                return self._column(name, None)
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=place)):
                return self._column(name, place)
        raise self._error(f"{ast.unparse(node)}: {_ALLOWED}")

    def _number(self, value: float) -> _Operand:
        if abs(value) > _LARGEST_NUMBER:
            raise self._error(f"numbers may be up to {_LARGEST_NUMBER:g}")
        return _constant("number", float(value))

    def _column(self, name: str, place: Any) -> _Operand:
        if name not in SCHEMA.names:
            close = difflib.get_close_matches(name, SCHEMA.names, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise self._error(f"no column {name!r}; {hint}there are {', '.join(_usable())}")
        kind = SCHEMA.field(name).type
        self.columns.add(name)
        if pa.types.is_map(kind):
            if not isinstance(place, str):
                raise self._error(f'{name} holds values by name; write {name}["..."]')
            return _Operand("text", lambda manifest: self._mapped(manifest, name, place), name)
        if pa.types.is_fixed_size_list(kind):
            if type(place) is not int or not 0 <= place < kind.list_size:
                last = kind.list_size - 1
                raise self._error(f"{name} holds {kind.list_size} numbers; write {name}[0] ... {name}[{last}]")
            return _Operand("number", lambda manifest: manifest.values(name, place), name)
        if name in _sets():
            raise self._error(f'{name} holds names; write "..." in {name}')
        if name not in _usable():
            raise self._error(f"{name} cannot be filtered by; usable are {', '.join(_usable())}")
        if place is not None:
            raise self._error(f"{name} holds one value; write {name} without brackets")
        plain: Kind = "text" if pa.types.is_string(kind) else "flag" if pa.types.is_boolean(kind) else "number"
        return _Operand(plain, lambda manifest: manifest.values(name), name)

    def _mapped(self, manifest: Manifest, name: str, place: str) -> Any:
        known = manifest.keys(name)
        if place not in known:
            raise self._error(f"no volume has {name}[{place!r}]; there are {', '.join(known) or 'none'}")
        return manifest.values(name, place)

    def _error(self, why: str) -> ConfigError:
        return ConfigError(f"{self._key}={self._text}: {why}")


def _constant(kind: Kind, value: object) -> _Operand:
    scalar = pa.scalar(value)
    return _Operand(kind, lambda _: scalar)


def _mask(values: Any) -> NDArray[np.bool_]:
    return np.asarray(values.to_numpy(zero_copy_only=False), dtype=bool)


def _sets() -> list[str]:
    """Columns that hold any number of names."""
    return ["overlays", "warnings"]


def _usable() -> list[str]:
    types = pa.types
    usable = (types.is_fixed_size_list, types.is_integer, types.is_floating, types.is_string, types.is_boolean)
    names = [field.name for field in SCHEMA if any(is_one(field.type) for is_one in (*usable, types.is_map))]
    return [*(name for name in names if name != "crop_box"), *_sets()]
