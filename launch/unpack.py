"""The Python environment of a job, from one archive to the disk of each node.

Thousands of ranks that import Python from a parallel file system wait minutes for its metadata server; one archive a
node is one large read.

    python -m launch.unpack ARCHIVE FOLDER      run by one task on each node
"""

import hashlib
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from mimscale import durable
from mimscale.errors import LaunchError


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


def unpack(archive: Path, folder: Path) -> None:
    """Unpack `archive` as `folder`, complete or not at all. Does nothing when it is there already.

    Raises:
        LaunchError: the disk is full, the archive is broken or holds no bin/python.
    """
    if folder.exists():
        return
    here = f"{folder} on {socket.gethostname()}"
    temporary = folder.with_name(f"{durable.TEMPORARY_PREFIX}{folder.name}.{os.getpid()}")
    try:
        with durable.explained(LaunchError, folder, "name another slurm.node_dir in the profile"):
            temporary.mkdir(parents=True)
        done = subprocess.run(
            ["tar", "-xf", str(archive), "-C", str(temporary)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            reason = " ".join(done.stderr.split())[-300:]
            raise LaunchError(f"{archive}: not unpacked as {here}: {reason}; free space or make the archive again")
        if not (temporary / "bin" / "python").exists():
            raise LaunchError(
                f"{archive}: holds no bin/python at its top; make it with `tar -C ENVIRONMENT -cf FILE .`"
            )
        temporary.chmod(0o700)  # nobody else may put a module where our ranks look for one
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.exists():  # else another job on this node was faster
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main(argv: list[str]) -> int:
    """`python -m launch.unpack ARCHIVE FOLDER`."""
    archive, folder = map(Path, argv)
    start_s = time.monotonic()
    try:
        unpack(archive, folder)
    except LaunchError as error:
        print(f"mimscale: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    print(f"mimscale: {socket.gethostname()}: {folder} ready in {time.monotonic() - start_s:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
