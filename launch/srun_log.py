"""Who failed first, from what srun and the ranks print.

srun's own exit code is the highest of all ranks, and those that it ends because of the first end worse than that one.
"""

import re
from dataclasses import dataclass

_END = re.compile(r"^srun: error: (?P<node>\S+): tasks? (?P<tasks>[\d,-]+): (?P<how>.+)$", re.MULTILINE)
_EXIT_CODE = re.compile(r"Exited with exit code (\d+)")
_MESSAGE = re.compile(r"^mimscale(?: \w+)?: (?!\d\d:\d\d:\d\d )(?P<text>.+(?:\n  .+)*)", re.MULTILINE)
MESSAGE_CHARACTERS = 600


@dataclass(frozen=True, kw_only=True)
class FirstEnd:
    """The first rank that did not end well."""

    node: str
    rank: int
    code: int | None  # None when a signal ended it
    how: str  # in srun's words


def newest_start(batch_log: str) -> str:
    """What was printed since the job started last."""
    return batch_log[max(0, batch_log.rfind(" of job ")) :]  # written by `launch.requeue start`


def first_end(batch_log: str) -> FirstEnd | None:
    """The first failure that srun reports after the newest start of the job; None when it reports none."""
    found = _END.search(newest_start(batch_log))
    if found is None:
        return None
    rank = int(re.split("[,-]", found["tasks"])[0])
    code = _EXIT_CODE.search(found["how"])
    return FirstEnd(node=found["node"], rank=rank, code=int(code[1]) if code else None, how=found["how"])


def last_message(rank_log: str) -> str:
    """The last error that mimscale printed, with the lines that belong to it; empty when there is none."""
    texts = [found["text"] for found in _MESSAGE.finditer(rank_log)]
    return texts[-1][:MESSAGE_CHARACTERS] if texts else ""
