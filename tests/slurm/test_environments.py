"""Jobs whose Python comes from an archive that is unpacked on the nodes, or out of a container's image."""

import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
from devcluster import DevCluster, Site
from disks import small_disk

from launch.attempts import read_attempts
from launch.unpack import draft_of, environment_folder

pytestmark = pytest.mark.timeout(600)
ODD = "a b 'c' \"d\" $HOME `x` \\ *"  # the value of a variable that no shell on the way may touch


def write_environment(folder: Path) -> Path:
    """An environment with an interpreter and little else: its packages are those of the tests' own one."""
    interpreter = Path(sys.executable).resolve()
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(interpreter)
    (folder / "pyvenv.cfg").write_text(f"home = {interpreter.parent}\n")
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    packages.mkdir(parents=True)
    say_who = "'SLURM_PROCID' in os.environ and print('interpreter:', sys.executable, file=sys.stderr)"
    lines = [f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})", f"import os, sys; {say_who}"]
    (packages / "elsewhere.pth").write_text("\n".join(lines))
    if (Path(sys.prefix) / "torch_extensions").exists():  # or DeepSpeed builds its op again, which takes a minute
        (folder / "torch_extensions").symlink_to(Path(sys.prefix) / "torch_extensions")
    return folder


def pack(folder: Path, archive: Path) -> Path:
    subprocess.run(["tar", "-C", str(folder), "-cf", str(archive), "."], check=True)
    return archive


def log_of(site: Site, name: str, rank: int) -> str:
    folder = site.newest(name)
    return folder.rank_log(folder.task_job_id(None), rank).read_text()


def test_ranks_run_out_of_an_archive_that_each_node_unpacks_once_and_a_full_disk_is_named(
    cluster: DevCluster, site: Site, tmp_path: Path
) -> None:
    environment = write_environment(tmp_path / "environment")
    archive, node_dir = pack(environment, tmp_path / "it's an env.tar"), tmp_path / "node's disk"
    unpacked = environment_folder(archive, str(node_dir))
    python = unpacked / "bin" / "python"
    half = draft_of(unpacked) / "bin" / "python"  # of a task that was killed
    half.parent.mkdir(parents=True)
    half.write_text("#!/bin/false\n")

    slurm = {"env_archive": str(archive), "node_dir": str(node_dir)}
    site.profile(processes_per_node=1, slurm=slurm)
    site.submit("first", steps=2)
    site.wait_until_finished("first")
    shown = log_of(site, "first", 0)
    # The nodes of this cluster have one disk, so one task unpacks and that of the other node finds it.
    assert shown.count(f"{unpacked} unpacked on node") == 1
    assert shown.count(f"{unpacked} found on node") == 1
    assert {f"on node{number} in" in shown for number in (1, 2)} == {True}
    for rank in (0, 1):
        assert f"interpreter: {python}\n" in log_of(site, "first", rank)
    assert not draft_of(unpacked).exists()

    (unpacked / "kept").touch()
    site.submit("second", steps=1, nodes=1)
    site.wait_until_finished("second")
    assert f"{unpacked} found on node" in log_of(site, "second", 0)
    assert f"interpreter: {python}\n" in log_of(site, "second", 0)
    assert (unpacked / "kept").exists()

    (environment / "weights").write_bytes(os.urandom(500_000))
    with small_disk(tmp_path / "small disk", 256) as disk:
        full = pack(environment, tmp_path / "large.tar")
        site.profile(processes_per_node=1, slurm={"env_archive": str(full), "node_dir": str(disk)})
        job_id = site.submit("third", steps=1)
        cluster.wait_for("the job to end", lambda: site.is_settled("third"))
        assert [path for path in disk.iterdir() if path.suffix != ".lock"] == []
    outcome = site.newest("third").read_outcome()
    assert outcome is not None
    assert outcome.exit_code == 5
    assert outcome.message.startswith(f"before its ranks started: {full}: not unpacked as {disk}/mimscale-env-")
    assert "the disk is full" in outcome.message
    assert "name another slurm.node_dir" in outcome.message
    cluster.wait_for_state(job_id, "FAILED")
    assert len(site.attempts("third")) == 1


# `apptainer exec` as far as our jobs use it. Its image holds all of this machine but HIDDEN, where only what was bound
# can be seen; on the node that BLIND names no folder called `store`.
APPTAINER = """\
#!/bin/bash
set -euo pipefail
record=$RECORDS/$(hostname)
printf '%s\\0' "$@" >"$record.words"
env -0 >"$record.variables"
[ "$1" = exec ] || exit 64
shift
binds=()
while [[ $1 == --* ]]; do
  [ "$1" = --bind ] || exit 64
  binds+=("$2")
  shift 2
done
[ -f "$1" ] || { echo "FATAL: could not open image $1" >&2; exit 255; }
shift
export BINDS=$(printf '%s\\n' "${binds[@]}")
exec unshare --mount bash -c '
  set -eu
  hold=$(mktemp -d)
  mount -t tmpfs none "$hold"
  number=0
  while IFS=: read -r source target; do
    number=$((number + 1))
    mkdir "$hold/$number"
    mount --rbind "$source" "$hold/$number"
  done <<<"$BINDS"
  mount -t tmpfs none "$HIDDEN"
  number=0
  while IFS=: read -r source target; do
    number=$((number + 1))
    [ "$(hostname)/store" != "${BLIND:-}/${target##*/}" ] || continue
    mkdir -p "$target"
    mount --rbind "$hold/$number" "$target"
  done <<<"$BINDS"
  umount --lazy "$hold"
  rmdir "$hold"
  exec "$@"
' bash "$@"
"""


def strings(file: Path) -> list[str]:
    """What was recorded, each string ended by a zero."""
    return file.read_text().split("\0")[:-1]


def test_a_container_sees_what_it_is_given_and_a_node_without_the_store_is_named_within_a_minute(
    cluster: DevCluster, tmp_path: Path
) -> None:
    hidden, records, programs = tmp_path / "hidden", tmp_path / "records", tmp_path / "programs"
    for folder in (hidden / "site", records, programs):
        folder.mkdir(parents=True)
    site = Site(hidden / "site", cluster)
    store, runs = hidden / "data" / "the store" / "store", hidden / "the runs"
    store.parent.mkdir(parents=True)
    (site.folder / "store").rename(store)
    image = tmp_path / "an image's $(file).sif"
    image.write_text("the stand-in only looks whether it is there")
    (programs / "apptainer").write_text(APPTAINER)
    (programs / "apptainer").chmod(0o755)
    site.variables["PATH"] = os.pathsep.join([str(programs), cluster.environment()["PATH"]])
    extra = tmp_path / "extra"
    extra.mkdir()
    container = {
        "image": str(image),
        "runtime": "apptainer",
        "python": sys.executable,
        "mounts": [f"{extra}:{hidden / 'extra'}"],
    }
    variables = {"RECORDS": str(records), "HIDDEN": str(hidden), "ODD": ODD}
    site.profile(processes_per_node=1, slurm={"container": container}, environment=variables)
    seen = str(runs / "seen")
    site.submit(seen, f"store={store}", steps=2)
    site.wait_until_finished(seen)

    bound = [site.run(seen).path, site.folder, store]
    for number in (1, 2):
        words = strings(records / f"node{number}.words")
        binds = [word for path in bound for word in ("--bind", f"{path}:{path}")]
        binds += ["--bind", f"{extra}:{hidden / 'extra'}"]
        rank = [sys.executable, "-u", "-m", "submitit.core._submit", str(site.newest(seen).path)]
        assert words == ["exec", *binds, str(image), *rank]
        given = dict(pair.split("=", 1) for pair in strings(records / f"node{number}.variables"))
        assert given["ODD"] == ODD
        assert given["GLOO_SOCKET_IFNAME"] == "eth0"
        assert Path(given["PYTHONPATH"].split(os.pathsep)[0]).parent == site.run(seen).code

    site.profile(processes_per_node=1, slurm={"container": container}, environment={**variables, "BLIND": "node2"})
    unseen = str(runs / "unseen")
    site.submit(unseen, f"store={store}", steps=2)
    cluster.wait_for("the job to end", lambda: site.is_settled(unseen))
    outcome = site.newest(unseen).read_outcome()
    assert outcome is not None
    assert outcome.exit_code == 5
    assert f"node2: store={store} cannot be read there" in outcome.message
    assert "mount it" in outcome.message
    (attempt,) = read_attempts(site.newest(unseen).attempts_file())
    assert time.time() - attempt.started_unix_s < 60


@pytest.mark.soak
def test_a_job_for_gpus_on_nodes_without_ends_at_once_and_trains_on_no_cpu(cluster: DevCluster, site: Site) -> None:
    site.profile(processes_per_node=1, accelerator="cuda")
    site.submit(steps=2)
    cluster.wait_for("the job to end", site.is_settled)
    outcome = site.newest().read_outcome()
    assert outcome is not None
    assert outcome.exit_code == 5
    assert "DS_ACCELERATOR=cuda, but torch sees no CUDA device here" in outcome.message
    assert not site.run().metrics.exists()
