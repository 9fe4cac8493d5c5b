"""The batch scripts in slurm/: they ask for what `mimscale submit` asks for, and they really run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from devcluster import CHECKOUT, PROFILE, DevCluster, Site

TRAIN = CHECKOUT / "slurm" / "train.sbatch"
INGEST = TRAIN.with_name("ingest.sbatch")
EXAMPLE = PROFILE.with_name("example.yaml")
# Where the logs go is settled by who submits; which job it is as well.
OWN_AFFAIR = {"job-name", "output", "error"}
pytestmark = pytest.mark.timeout(600)


def options_of(script: str) -> dict[str, str]:
    """The `#SBATCH` options of a batch script."""
    return dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", script, re.MULTILINE))


def srun_options_of(script: str) -> dict[str, str]:
    """The options of the srun that starts the ranks."""
    (line,) = re.findall(r"^ *(?:exec )?srun .*--kill-on-bad-exit.*$", script.replace("\\\n", ""), re.MULTILINE)
    return dict(re.findall(r"--([a-z-]+)(?:=(\S+))?", line.split(" mimscale ")[0]))


def generated(folder: Path, *words: str) -> str:
    """The script that `mimscale submit` makes with the example profile, less what differs from site to site."""
    tree = yaml.safe_load(EXAMPLE.read_text())
    tree["slurm"] = {key: tree["slurm"][key] for key in ("gpus_per_node", "cpus_per_task", "wait_s")}
    (folder / "profile.yaml").write_text(yaml.safe_dump(tree))
    done = subprocess.run(
        [sys.executable, "-m", "mimscale.cli", "submit", *words, "--profile", "profile.yaml", "--dry-run", "--json"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    script = yaml.safe_load(done.stdout)["sbatch"]
    assert isinstance(script, str)
    return script


def test_the_script_for_training_by_hand_asks_for_what_submit_asks_for(tmp_path: Path) -> None:
    script = generated(tmp_path, "pretrain", "pretrain_mae_vit_b", "store=store", "run_dir=run")
    by_hand = TRAIN.read_text()

    ours, theirs = options_of(by_hand), options_of(script)
    assert ours.keys() - OWN_AFFAIR == theirs.keys() - OWN_AFFAIR - {"export"}  # ALL, as by default
    for name in ("signal", "requeue", "open-mode", "ntasks-per-node", "gpus-per-node", "cpus-per-task"):
        assert ours[name] == theirs[name]
    ours, theirs = srun_options_of(by_hand), srun_options_of(script)
    assert ours.keys() == theirs.keys() - OWN_AFFAIR - {"unbuffered", "open-mode"}  # of log files for each rank
    for name in ("kill-on-bad-exit", "wait"):
        assert ours[name] == theirs[name]


def test_the_script_for_ingest_by_hand_asks_for_what_submit_asks_for(tmp_path: Path) -> None:
    (tmp_path / "a.nii").touch()
    script = generated(tmp_path, "ingest", "ingest_ct", "sources=*.nii", "out=store")
    by_hand = INGEST.read_text()

    ours, theirs = options_of(by_hand), options_of(script)
    # No signal: an ingest keeps each part that is done, so to be killed costs little. No GPUs: it has no use for them.
    assert ours.keys() - OWN_AFFAIR == theirs.keys() - OWN_AFFAIR - {"export", "signal", "gpus-per-node"}
    for name in ("nodes", "ntasks-per-node", "requeue", "open-mode"):
        assert ours[name] == theirs[name]
    ours, theirs = srun_options_of(by_hand), srun_options_of(script)
    assert ours.keys() == theirs.keys() - OWN_AFFAIR - {"unbuffered", "open-mode", "wait"}  # there is one task
    assert ours["kill-on-bad-exit"] == theirs["kill-on-bad-exit"]


def by_hand(cluster: DevCluster, folder: Path, *options: str, words: tuple[str, ...]) -> str:
    """sbatch as a user without GPUs gives it; returns the job's id."""
    base = ["--parsable", f"--chdir={folder}", "--gpus-per-node=0", "--ntasks-per-node=2", "--cpus-per-task=2"]
    variables = f"--export=ALL,DS_ACCELERATOR=cpu,GLOO_SOCKET_IFNAME=eth0,PYTHONPATH={CHECKOUT}"
    return cluster.command("sbatch", *base, variables, *options, str(TRAIN), *words)


@pytest.mark.soak
def test_the_batch_script_trains_on_two_nodes_and_a_signal_sends_it_back_to_the_queue(
    cluster: DevCluster, site: Site
) -> None:
    steps = 100
    words = ("pretrain", "recipe.yaml", "run_dir=run", f"steps={steps}", "checkpoint.every_steps=1000")
    cluster.runs.append(site.run())
    job_id = by_hand(cluster, site.folder, "--nodes=2", words=words)
    site.wait_for_step(job_id, 20)
    cluster.command("scancel", "--signal=USR2", job_id)
    cluster.wait_for("the job to start again", lambda: "Restarts=1" in cluster.show(job_id))
    assert cluster.wait_for_state(job_id, "COMPLETED", "FAILED") == "COMPLETED"
    assert site.logged_steps() == list(range(1, steps + 1))
    assert len(list(site.run().checkpoints.glob("step_*"))) == 2  # that of the signal, and the last


def test_torchrun_starts_the_ranks_of_one_node(cluster: DevCluster, site: Site) -> None:
    cluster.runs.append(site.run())
    command = "torchrun --nproc-per-node 2 --no-python mimscale pretrain recipe.yaml run_dir=run steps=4"
    variables = f"--export=ALL,DS_ACCELERATOR=cpu,PYTHONPATH={CHECKOUT}"
    job_id = cluster.command(
        "sbatch", "--parsable", f"--chdir={site.folder}", "--cpus-per-task=2", variables, f"--wrap={command}"
    )
    assert cluster.wait_for_state(job_id, "COMPLETED", "FAILED") == "COMPLETED"
    assert site.logged_steps() == [1, 2, 3, 4]
    assert sorted(path.stem for path in site.run().samples.iterdir()) == ["rank00000", "rank00001"]
