"""A copy of the code for each job: what is edited while a job waits or is interrupted does not change the job."""

import hashlib
import shutil
from pathlib import Path

import launch
import mimscale
from mimscale import durable
from mimscale.errors import LaunchError

PACKAGES = (mimscale, launch)
BYTECODE = "__pycache__"


def snapshot_code(code: Path) -> Path:
    """Copy the running packages into `code/<hash of their bytes>`; returns that folder. The same code is kept once.

    They are copied as they lie there, whatever git knows of them: what is not committed, and what a compiler has built,
    belong to the code that was tried out before it was submitted.

    Raises:
        LaunchError: the disk is full or not writable.
    """
    files: dict[str, Path] = {}
    for package in PACKAGES:
        assert package.__file__ is not None
        root = Path(package.__file__).parent
        for path in sorted(root.rglob("*")):
            if path.is_file() and BYTECODE not in path.parts:
                files[f"{root.name}/{path.relative_to(root)}"] = path
    digest = hashlib.sha256()
    for name, path in files.items():
        digest.update(f"{name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    final = code / digest.hexdigest()[:16]
    if final.exists():
        return final
    temporary = final.with_name(durable.TEMPORARY_PREFIX + final.name)
    with durable.explained(LaunchError, final, "free space or choose another run_dir"):
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            for name, path in files.items():
                target = temporary / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
            durable.rename_folder(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # on a full disk half a copy only takes space
    return final
