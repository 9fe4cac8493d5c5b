"""The Python environment of a job, from one archive to the disk of each node.

Thousands of ranks that import Python from a parallel file system wait minutes for its metadata server; one archive a
node is one large read.

    python -m launch.unpack ARCHIVE FOLDER      run by one task on each node
"""

import fcntl
import hashlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mimscale import durable
from mimscale.errors import LaunchError
from mimscale.world import die_with_parent


def environment_folder(archive: Path, node_dir: str) -> Path:
    """Where a node unpacks this archive; another name when the archive is replaced.

    Raises:
        LaunchError: no such file.
    """
    try:
        facts = archive.stat()
    except OSError as error:
        raise LaunchError(
            f"slurm.env_archive={archive}: {error.strerror}; see the README for how to make one"
        ) from None
    identity = f"{archive}\0{facts.st_size}\0{facts.st_mtime_ns}\0{os.getuid()}"
    return Path(node_dir) / f"mimscale-env-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"


def draft_of(folder: Path) -> Path:
    """What `folder` is called while it is not complete."""
    return folder.with_name(durable.TEMPORARY_PREFIX + folder.name)


def unpack(archive: Path, folder: Path) -> bool:
    """Unpack `archive` as `folder`, complete or not at all. Another task that is at it on this node is waited for.

    Returns:
        True when it was unpacked now, False when it was there already.

    Raises:
        LaunchError: the disk is full, the archive is broken or holds no bin/python, or the folder is not ours.
    """
    with durable.explained(LaunchError, folder, "name another slurm.node_dir in the profile"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(folder):
            if os.path.lexists(folder):
                _refuse_foreign(folder)
                return False
            draft = draft_of(folder)
            if draft.exists():  # of a task that was killed
                shutil.rmtree(draft)
            draft.mkdir(mode=0o700)  # nobody else may put a module where our ranks look for one
            try:
                _fill(draft, archive, f"{folder} on {socket.gethostname()}")
                draft.chmod(0o700)  # the archive has a mode for its top, too
                draft.rename(folder)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    return True


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    # A node's own disk has a flock that works, and the kernel gives it back when its holder is killed.
    descriptor = os.open(folder.with_name(f".{folder.name}.lock"), os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _refuse_foreign(folder: Path) -> None:
    """In /tmp anybody could have made a folder of this name, and what lies in it is executed."""
    status = folder.lstat()
    if (
        not stat.S_ISDIR(status.st_mode)
        or status.st_uid != os.getuid()
        or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    ):
        raise LaunchError(
            f"{folder} on {socket.gethostname()}: others made it or may write to it, and what lies there would be "
            "executed; remove it, or name another slurm.node_dir in the profile"
        )


def _fill(draft: Path, archive: Path, here: str) -> None:
    done = subprocess.run(
        ["tar", "--no-same-owner", "-xf", str(archive), "-C", str(draft)],
        env={**os.environ, "LC_ALL": "C"},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        preexec_fn=lambda: die_with_parent(signal.SIGKILL),  # or it would go on writing into the next one's draft
    )
    if done.returncode:
        reason = " ".join(done.stderr.split())
        if "No space left" in reason or "Disk quota" in reason:
            raise LaunchError(
                f"{archive}: not unpacked as {here}: the disk is full ({archive.stat().st_size / 1e6:.1f} MB are "
                "packed); free space there, or name another slurm.node_dir in the profile"
            )
        raise LaunchError(f"{archive}: not unpacked as {here}: {reason[-300:]}; make the archive again")
    python = draft / "bin" / "python"
    if python.is_symlink() and not python.exists():
        raise LaunchError(
            f"{archive}: not unpacked as {here}: its bin/python is a link to {os.path.realpath(python)}, which is not "
            "there; install that interpreter on the nodes, or pack an environment that has its own"
        )
    if not python.exists():
        raise LaunchError(f"{archive}: holds no bin/python at its top; make it with `tar -C ENVIRONMENT -cf FILE .`")
    # A node that loses power must not find names without contents.
    subprocess.run(["sync", "--file-system", str(draft)], check=True)


def main(argv: list[str]) -> int:
    """`python -m launch.unpack ARCHIVE FOLDER`."""
    archive, folder = map(Path, argv)
    start_s = time.monotonic()
    try:
        how = "unpacked" if unpack(archive, folder) else "found"
    except LaunchError as error:
        print(f"mimscale: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    spent_s = time.monotonic() - start_s
    print(
        f"mimscale: {time.strftime('%H:%M:%S')} {folder} {how} on {socket.gethostname()} in {spent_s:.1f} s", flush=True
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
