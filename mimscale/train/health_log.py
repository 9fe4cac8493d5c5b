"""health.jsonl in the run directory: what was wrong, one JSON object an event. Rank 0 appends to it; no torch here.

time_s    seconds since 1970
step      the optimizer step that it was found at
event     skipped | stopped | spike | rolled_back | slow_rank
message   for a person; and further numbers by event
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mimscale import durable
from mimscale.errors import CheckpointError

Event = Literal["skipped", "stopped", "spike", "rolled_back", "slow_rank"]


@dataclass(frozen=True)
class HealthLog:
    """The events of one run."""

    path: Path

    def append(self, step: int, event: Event, message: str, **facts: Any) -> None:
        """Write one event.

        Raises:
            CheckpointError: the disk is full or not writable.
        """
        line = {"time_s": round(time.time(), 3), "step": step, "event": event, "message": message, **facts}
        with (
            durable.explained(CheckpointError, self.path, "free space, then give the same command again"),
            self.path.open("a") as file,
        ):
            file.write(json.dumps(line) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All events, oldest first. A last line cut short by a kill is left out."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def count(self, event: Event, *, up_to_step: int) -> int:
        """How often something happened in steps that are not repeated."""
        steps = {line["step"] for line in self.read() if line["event"] == event}  # a repeated step counts once
        return sum(step <= up_to_step for step in steps)
