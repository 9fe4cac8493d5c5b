"""The checkpoints before the newest one: which are whole, which stay, and the deletion of the others. For rank 0 alone.

With thousands of ranks a checkpoint has thousands of files, and on a parallel file system each look at one is a
request. So what this process has once found whole, or has written itself, is later looked at by its few files alone,
those that are not a rank's part; and a thread deletes. What a commit waits for grows with the number of checkpoints
that stay, and not with the ranks.
"""

import shutil
import threading
from pathlib import Path
from typing import Any

from mimscale import durable
from mimscale.console import say
from mimscale.train.committed import (
    MANIFEST,
    PART_PREFIX,
    checkpoints_kept,
    read_manifest,
    step_of,
    tags,
    why_not_as_saved,
    why_not_loadable,
)
from mimscale.train.config import CheckpointConfig
from mimscale.train.run_dir import RunDir


class OlderCheckpoints:
    """What rank 0 knows of a run's checkpoints."""

    def __init__(self, run: RunDir, config: CheckpointConfig) -> None:
        self._run = run
        self._config = config
        # Folder -> its few files with their sizes; None: it is not whole.
        self._known: dict[str, dict[str, Any] | None] = {}
        self._deletion: threading.Thread | None = None

    def found(self, tag: Path, *, whole: bool) -> None:
        """Remember what all ranks together have found out about a checkpoint of an earlier process."""
        self._known[tag.name] = _few(read_manifest(tag)["files"]) if whole else None

    def saved(self, tag: Path, files: dict[str, Any]) -> None:
        """Remember a checkpoint that was just committed, with the files of its manifest."""
        self._known[tag.name] = _few(files)

    def prune(self, newest_good: Path) -> None:
        """Take the final names of all that need not stay, and begin to delete them."""
        kept = checkpoints_kept(self._run, self._config, newest_good, is_whole=self._is_whole)
        self.wait()
        doomed = []
        for tag in reversed(tags(self._run)):
            if step_of(tag) not in kept:
                doomed.append(tag.with_name(f"{durable.TEMPORARY_PREFIX}doomed-{tag.name}"))
                # Deletion is atomic too: half a checkpoint never has a final name.
                durable.rename_folder(tag, doomed[-1])
                self._known.pop(tag.name, None)
        if doomed:
            # A daemon: what is left when the process ends goes with the next start.
            self._deletion = threading.Thread(target=_delete, args=(doomed,), daemon=True)
            self._deletion.start()

    def wait(self) -> None:
        """Until what `prune` took away is gone, and its space free again."""
        if self._deletion is not None:
            self._deletion.join()
            self._deletion = None

    def _is_whole(self, tag: Path) -> bool:
        if tag.name not in self._known:  # somebody else has put it there
            self.found(tag, whole=why_not_loadable(tag, hashes=False) is None)
        few = self._known[tag.name]
        return (
            few is not None
            and (tag / MANIFEST).is_file()
            and all(why_not_as_saved(tag, name, entry, hashes=False) is None for name, entry in few.items())
        )


def _few(files: dict[str, Any]) -> dict[str, Any]:
    return {name: entry for name, entry in files.items() if not name.startswith(PART_PREFIX)}


def _delete(folders: list[Path]) -> None:
    for folder in folders:
        try:
            shutil.rmtree(folder)
        except OSError as error:
            say(f"{folder}: an older checkpoint could not be deleted ({error}); the next start tries again")
