"""What torch could not compile, and why: a row of a benchmark must not pass for compiled when it is not."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

_LOGGER = "torch._dynamo.convert_frame"
_ERROR = re.compile(r"^[\w.]*[A-Z]\w*: \S")  # the last line of a traceback
_MOST_CHARACTERS = 160


@dataclass
class Fallbacks:
    """Functions that run as they are."""

    count: int = 0
    reasons: list[str] = field(default_factory=list)  # the different ones, in torch's words

    @property
    def reason(self) -> str | None:
        """All of them in one line; None where everything was compiled."""
        return ("; ".join(self.reasons) or "torch gives no reason") if self.count else None


class _Listener(logging.Handler):
    def __init__(self, reasons: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._reasons = reasons

    def emit(self, record: logging.LogRecord) -> None:
        reason = reason_of(record.getMessage())
        if reason not in self._reasons:
            self._reasons.append(reason)


def reason_of(message: str) -> str:
    """One line of what torch says of a function that it gave up: the error of a traceback, else how it begins."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line for line in lines[1:] if _ERROR.match(line)]
    return " ".join((errors[0] if errors else lines[0]).split())[:_MOST_CHARACTERS]


@contextmanager
def fallbacks() -> Iterator[Fallbacks]:
    """Count what is compiled in the block and falls back. What was compiled before is forgotten: it would count against
    the number of shapes that torch compiles a function for.
    """
    torch._dynamo.reset()
    frames, found = torch._dynamo.utils.counters["frames"], Fallbacks()
    before = frames["total"] - frames["ok"]
    logger, listener = logging.getLogger(_LOGGER), _Listener(found.reasons)
    logger.addHandler(listener)
    try:
        yield found
    finally:
        logger.removeHandler(listener)
        frames = torch._dynamo.utils.counters["frames"]
        found.count = int(frames["total"] - frames["ok"] - before)
