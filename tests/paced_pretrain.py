"""`pretrain` for tests of time limits: Slurm knows none below a minute, which takes each machine to another step.

So each start of a job makes PACE more steps than the one before could, stands still, and waits to be asked to leave.
"""

import os
import time
from typing import Any

from mimscale.train.verbs import pretrain_main
from mimscale.world import StopRequest


def main(argv: list[str]) -> int:
    """What stands in for `mimscale pretrain`; PACE comes from the profile's environment."""
    if "--check" not in argv:
        start = 1 + int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        _stand_still_after(start * int(os.environ["PACE"]))
    return pretrain_main(argv)


def _stand_still_after(steps: int) -> None:
    from mimscale.train import session
    from mimscale.train.pretrain import MaskedReconstruction

    requests: list[StopRequest] = []
    loss = MaskedReconstruction.loss

    def remembered() -> StopRequest:
        requests.append(StopRequest())
        return requests[-1]

    def paced(self: MaskedReconstruction, forward: Any, batch: Any) -> Any:
        while batch.batch_index >= steps and not requests[0].reason:
            time.sleep(0.05)
        return loss(self, forward, batch)

    session.StopRequest = remembered  # type: ignore[assignment,misc]
    MaskedReconstruction.loss = paced  # type: ignore[method-assign]
