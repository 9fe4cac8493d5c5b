"""Jobs on this machine: Submitit's local executor with our supervisor in place of its controller."""

import shlex
import subprocess
import sys
from typing import Any

import submitit
from submitit.local.local import LocalJob

from launch.folder import JobFolder


class SupervisedExecutor(submitit.LocalExecutor):
    """Starts `launch.supervise`.

    The job has its own session, so it survives the shell, and holds none of the shell's pipes, so `submit | cat` ends.
    """

    def __init__(self, folder: JobFolder, *, processes: int, environment: dict[str, str]) -> None:
        super().__init__(folder.path, python=shlex.quote(sys.executable))
        self._job_folder = folder
        self._environment = environment
        self.update_parameters(tasks_per_node=processes)

    def _submit_command(self, command: str) -> LocalJob[Any]:
        with self._job_folder.supervisor_log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "launch.supervise", str(self.folder), command],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return LocalJob(self.folder, str(process.pid), tasks=range(self._num_tasks()), process=process)
