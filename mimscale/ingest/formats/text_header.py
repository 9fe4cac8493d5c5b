"""Fields of a header that is text: name -> what stands behind it."""

from collections.abc import Mapping

from mimscale.ingest.formats.reasons import QuarantineError

HEADER_BYTES = 2**20  # what has more text before its voxels is no header
_MOST_NUMBERS = 16


def field(fields: Mapping[str, str], name: str) -> str:
    """The text of a field that must be there.

    Raises:
        QuarantineError: unreadable.
    """
    if name not in fields:
        raise QuarantineError("unreadable", f"the header has no {name}")
    return fields[name]


def integers(fields: Mapping[str, str], name: str) -> list[int]:
    """The whole numbers of a field that must be there.

    Raises:
        QuarantineError: unreadable.
    """
    words = field(fields, name).split()
    if not 1 <= len(words) <= _MOST_NUMBERS:
        raise QuarantineError("unreadable", f"{name} holds {len(words)} words")
    try:
        return [int(word) for word in words]
    except ValueError:
        raise QuarantineError("unreadable", f"{name} holds a word that is no whole number") from None


def integer(fields: Mapping[str, str], name: str, default: int) -> int:
    """The whole number of a field that may be there.

    Raises:
        QuarantineError: unreadable.
    """
    return integers(fields, name)[0] if name in fields else default


def floats(text: str, separator: str | None = None) -> list[float]:
    """The numbers of a text.

    Raises:
        QuarantineError: unreadable.
    """
    try:
        return [float(word) for word in text.split(separator)]
    except ValueError:
        raise QuarantineError("unreadable", "a word where a number must stand") from None
