"""The batch script of a Slurm job: what it asks for, and that no value of a profile becomes a command."""

import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launch.profile import Profile
from launch.slurm import BatchExecutor, BatchJob, new_job_name
from launch.slurm_commands import after_success
from launch.slurm_profile import ContainerConfig, SlurmConfig
from launch.submission import named_places
from launch.unpack import environment_folder
from mimscale.errors import ConfigError, LaunchError


def _job(folder: Path = Path("/runs/a/logs/001"), slurm: SlurmConfig | None = None, **changes: object) -> BatchJob:
    profile = Profile(executor="slurm", timeout_min=90, signal_lead_s=150, slurm=slurm or SlurmConfig())
    job = BatchJob(folder=folder, profile=profile, job_name="mimscale-x", nodes=2, processes=4, environment={})
    return replace(job, **changes)  # type: ignore[arg-type]


def _options(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    pairs = (line.partition("=") for line in lines)
    return {name: "".join(shlex.split(value)) for name, _, value in pairs}


def _srun_words(script: str) -> list[str]:
    (line,) = [line for line in script.splitlines() if line.startswith("srun ") and "submitit" in line]
    return shlex.split(line)


def test_the_script_asks_slurm_for_what_the_profile_says() -> None:
    slurm = SlurmConfig(
        partition="gpu,long",
        account="lab",
        qos="high",
        constraint="a100&ib",
        reservation="course",
        exclude="n[01-03]",
        gpus_per_node=4,
        cpus_per_task=12,
        memory_gb_per_node=0,
        exclusive=True,
        sbatch_options={"mail-type": "END,FAIL"},
    )
    options = _options(BatchExecutor(_job(slurm=slurm, dependency=after_success(["7", "8"]))).script())
    assert options == {
        "partition": "gpu,long",
        "account": "lab",
        "qos": "high",
        "constraint": "a100&ib",
        "reservation": "course",
        "exclude": "n[01-03]",
        "gpus-per-node": "4",
        "cpus-per-task": "12",
        "mem": "0M",
        "exclusive": "",
        "mail-type": "END,FAIL",
        "nodes": "2",
        "ntasks-per-node": "4",
        "time": "90:00",
        "signal": "USR2@150",
        "requeue": "",
        "export": "ALL",
        "open-mode": "append",
        "job-name": "mimscale-x",
        "dependency": "afterok:7:8",
        "output": "/runs/a/logs/001/%j_0_log.out",
    }


def test_srun_ends_all_ranks_with_the_first_that_fails_and_gives_each_its_cores() -> None:
    slurm = SlurmConfig(cpus_per_task=12, cpu_bind="cores", wait_s=60, srun_options=("--mpi=none",))
    words = _srun_words(BatchExecutor(_job(slurm=slurm)).script())
    for word in ("--kill-on-bad-exit=1", "--wait=60", "--cpus-per-task=12", "--cpu-bind=cores", "--mpi=none"):
        assert word in words
    assert words[words.index("--output") + 1] == "/runs/a/logs/001/%j_%t_log.out"
    assert "--open-mode=append" in words  # or a restart would empty the logs


def test_gpus_are_left_to_slurm() -> None:
    assert "CUDA_VISIBLE_DEVICES" not in BatchExecutor(_job(slurm=SlurmConfig(gres="gpu:a100:4"))).script()


EVIL = ["$(touch EVIL)", "`touch EVIL`", "; touch EVIL;", "' ; touch EVIL; '", '" ; touch EVIL; "', "a && touch EVIL"]
SHELL_FIELDS = ["modules", "source_files", "srun_options"]
OPTION_FIELDS = ["partition", "account", "qos", "constraint", "reservation", "nodelist", "exclude", "gres", "cpu_bind"]


@pytest.mark.parametrize("field", OPTION_FIELDS)
@pytest.mark.parametrize("value", [*EVIL[:5], "x\ntouch EVIL", "x\\", "x #y", " x", ""])
def test_a_value_that_sbatch_or_a_shell_could_read_as_more_is_refused(field: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"profile.slurm.{field}=.*write the plain value"):
        SlurmConfig(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("field", [*SHELL_FIELDS, "env_archive", "node_dir"])
def test_a_value_with_a_line_end_is_refused(field: str) -> None:
    value = "/x\ntouch EVIL" if field in ("env_archive", "node_dir") else ("-x\ntouch EVIL",)
    with pytest.raises(ValueError, match="line end or another control character"):
        SlurmConfig(**{field: value})  # type: ignore[arg-type]


def _run_script(job: BatchJob, folder: Path, *, srun: str = "", python: str = "", **variables: str) -> list[str]:
    """Run a batch script, with every program that it calls replaced by one that notes its words."""
    programs, ran = folder / "bin", folder / "ran"
    programs.mkdir()
    bodies = {"srun": srun, "module": "", "scancel": "", "python": python}
    for name, body in bodies.items():
        (programs / name).write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@" >> {ran}\n{body}\n')
        (programs / name).chmod(0o755)
    script = BatchExecutor(job).script()
    for python in (shlex.quote(_python_of(script)), shlex.quote(sys.executable)):  # of the ranks and of the script
        script = script.replace(python, str(programs / "python"))
    subprocess.run(
        ["/bin/bash", "-c", script],
        cwd=folder,
        env={"PATH": f"{programs}:/bin:/usr/bin", "SLURM_JOB_ID": "5", "SLURM_JOB_NUM_NODES": "1", **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=20,
        check=False,
    )
    return ran.read_text().splitlines()


@pytest.mark.parametrize("evil", EVIL)
def test_no_value_of_a_profile_becomes_a_command(tmp_path: Path, evil: str) -> None:
    file = tmp_path / evil.replace("/", "_")
    file.write_text("export SOURCED=1\n")
    slurm = SlurmConfig(modules=(evil,), source_files=(str(file),), srun_options=(f"--x={evil}",))
    words = _run_script(_job(tmp_path / "logs" / "001", slurm, environment={"A": evil, "B": evil}), tmp_path)
    assert f"--x={evil}" in words
    assert words[words.index("module") :][:3] == ["module", "load", evil]
    assert not (tmp_path / "EVIL").exists()


def test_a_file_of_the_site_that_a_node_does_not_see_ends_the_job_with_its_name(tmp_path: Path) -> None:
    words = _run_script(_job(tmp_path / "logs", SlurmConfig(source_files=("/none/site.sh",))), tmp_path)
    assert "srun" not in words
    assert words[-5:] == ["launch.requeue", "end", str(tmp_path / "logs"), "5", "before-ranks"]


def test_an_archive_that_cannot_be_unpacked_ends_the_job_before_its_ranks(tmp_path: Path) -> None:
    archive = tmp_path / "env.tar"
    archive.write_bytes(b"x")
    job = _job(tmp_path / "logs", SlurmConfig(env_archive=str(archive), node_dir=str(tmp_path / "a 'b")))
    words = _run_script(job, tmp_path, srun="exit 5")
    assert words.count("srun") == 1
    assert words[words.index("launch.unpack") + 2] == str(environment_folder(archive, str(tmp_path / "a 'b")))
    assert words[-5:] == ["launch.requeue", "end", str(tmp_path / "logs"), "5", "before-ranks"]


@pytest.mark.parametrize(("death", "asked"), [("kill -9 $$", "137"), ("exit 6", None)])
def test_a_start_that_is_killed_is_an_end_and_one_that_may_not_be_is_not_asked_about_again(
    tmp_path: Path, death: str, asked: str | None
) -> None:
    words = _run_script(_job(tmp_path / "logs"), tmp_path, python=f"test $3 != start || {death}")
    assert "srun" not in words
    end = (
        []
        if asked is None
        else ["python", "-m", "launch.requeue", "end", str(tmp_path / "logs"), asked, "before-ranks"]
    )
    assert words == ["python", "-m", "launch.requeue", "start", str(tmp_path / "logs"), *end]


@pytest.mark.parametrize("srun", ["", "kill -9 $PPID"], ids=["ends", "is killed"])
def test_nothing_of_a_script_outlives_it(tmp_path: Path, srun: str) -> None:
    mark = str(tmp_path / "outlived")
    _run_script(_job(tmp_path / "logs"), tmp_path, srun=srun, MARK=mark)
    deadline_s = time.monotonic() + 20  # it ends a moment later
    while (left := _marked(mark)) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not left


def _marked(mark: str) -> list[str]:
    """The commands that run with this mark in their environment."""
    found = [path for path in Path("/proc").glob("[0-9]*/environ") if f"MARK={mark}" in _text_of(path)]
    return [_text_of(path.with_name("cmdline")) for path in found]


def _text_of(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # ended meanwhile, or another user's
        return ""


@pytest.mark.parametrize(
    ("variables", "step"),
    [({}, "5.0"), ({"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "1"}, "5_1.0")],  # 5.0: of all tasks
)
def test_ranks_that_hang_are_ended_before_the_time_limit_and_what_follows_is_asked(
    tmp_path: Path, variables: dict[str, str], step: str
) -> None:
    profile = Profile(executor="slurm", timeout_min=1, signal_lead_s=4)
    end_s = int(time.time()) + 3
    hang = "for _ in 1 2 3 4 5 6 7 8 9; do sleep 0.5; grep -q ^scancel ran && exit 137; done"
    variables = {**variables, "SLURM_JOB_END_TIME": str(end_s)}
    words = _run_script(_job(tmp_path / "logs", profile=profile), tmp_path, srun=hang, **variables)
    assert time.time() < end_s + 1
    assert words[words.index("scancel") :][:3] == ["scancel", "--signal=KILL", step]
    assert words[-4:] == ["launch.requeue", "end", str(tmp_path / "logs"), "137"]


def _python_of(script: str) -> str:
    words = _srun_words(script)
    return words[words.index("submitit.core._submit") - 3]


@pytest.mark.parametrize("option", ["nodes", "time", "signal", "output", "requeue", "export", "array"])
def test_options_that_the_launcher_sets_are_refused_with_the_key_to_use(option: str) -> None:
    with pytest.raises(ValueError, match=f"sbatch_options.{option}: set by the launcher; "):
        SlurmConfig(sbatch_options={option: "1"})


@pytest.mark.parametrize("word", ["--kill-on-bad-exit=0", "--wait=1", "--cpu-bind=none", "--output=x"])
def test_words_of_srun_that_the_launcher_sets_are_refused(word: str) -> None:
    with pytest.raises(ValueError, match=f"srun_options: {word}: set by the launcher"):
        SlurmConfig(srun_options=(word,))


def test_a_variable_with_a_name_that_is_none_or_a_value_of_two_lines_is_refused() -> None:
    with pytest.raises(ValueError, match="is no name of a variable"):
        Profile(executor="slurm", environment={"A; touch EVIL": "1"})
    with pytest.raises(ValueError, match=r"profile.environment.A=.*line end"):
        Profile(executor="slurm", environment={"A": "1\n2"})


@pytest.mark.parametrize("name", ["a%jb", "a'b", 'a"b', "a#b", "a\nb", "a\\b"])
def test_a_run_directory_that_slurm_would_read_as_something_else_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(LaunchError, match="choose another run_dir"):
        BatchExecutor(_job(tmp_path / name / "logs" / "001"))


def test_a_job_without_a_time_limit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"profile.timeout_min: a Slurm job needs a time limit"):
        BatchExecutor(_job(profile=Profile(executor="slurm")))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"gpus_per_node": 4, "gres": "gpu:4"}, "ask for the same thing"),
        ({"memory_gb_per_node": 1, "memory_gb_per_cpu": 1}, "ask for the same thing"),
        ({"env_archive": "env.tar"}, "must be an absolute path"),
        ({"stage_dir": "nvme"}, "stage_dir='nvme': must be an absolute path"),
        ({"container": ContainerConfig(image="x"), "env_archive": "/e.tar"}, "both bring Python"),
        ({"max_requeues": -1}, "max_requeues=-1: 0 .never. or above"),
        ({"cpus_per_task": 0}, "cpus_per_task=0: must be above 0"),
    ],
)
def test_what_cannot_work_together_is_refused(fields: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        SlurmConfig(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gres", "gpus"), [("gpu:4", 4), ("gpu:a100:8", 8), ("gpu", 1), ("tmp:100G,gpu:h100:2", 2), ("tmp:100G", 0)]
)
def test_gpus_are_counted_from_gres(gres: str, gpus: int) -> None:
    assert SlurmConfig(gres=gres).gpus == gpus


def _port_and_end(script: str, **variables: str) -> tuple[int, int]:
    starts = ("end=", "read -r", "((first", "restart=", "export MIMSCALE_MASTER_PORT", "export MIMSCALE_STOP_AT")
    setup = "\n".join(line for line in script.splitlines() if line.startswith(starts))
    shown = subprocess.run(
        ["bash", "-c", f"{setup}\necho $MIMSCALE_MASTER_PORT $MIMSCALE_STOP_AT_UNIX_S"],
        env={"PATH": "/bin:/usr/bin", **variables},
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    port, stop_at = shown.stdout.split()
    return int(port), int(stop_at)


def test_the_port_lies_below_the_ephemeral_ones_and_differs_between_jobs_and_restarts() -> None:
    script = BatchExecutor(_job()).script()
    first_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    places = [{"SLURM_JOB_ID": str(job)} for job in (41, 42, 43, 123456789)]
    places += [{"SLURM_JOB_ID": "42", "SLURM_RESTART_COUNT": str(count)} for count in (1, 2, 3)]
    ports = [_port_and_end(script, **place)[0] for place in places]
    assert len(set(ports)) == len(ports)
    assert all(10_000 <= port < first_ephemeral for port in ports)


def test_the_ranks_are_told_to_stop_the_lead_before_the_end_that_slurm_names() -> None:
    script = BatchExecutor(_job()).script()
    assert _port_and_end(script, SLURM_JOB_ID="1", SLURM_JOB_END_TIME="1000000")[1] == 1_000_000 - 150


def test_a_job_array_numbers_its_logs_by_task() -> None:
    options = _options(BatchExecutor(_job(array=8, nodes=1, processes=1)).script())
    assert options["array"] == "0-7%8"
    assert options["output"] == "/runs/a/logs/001/%A_%a_0_log.out"


def test_a_job_must_see_the_store_the_weights_and_the_table_that_its_config_names() -> None:
    tree = {"store": "/s", "run_dir": "/r", "init_from": None, "targets": {"table": "/t/t.csv", "journal": None}}
    assert named_places(tree) == ["/s", "/r", "/t/t.csv"]
    assert named_places({"store": "none", "out": "/o", "targets": None}) == ["/o"]


def test_in_a_container_srun_or_apptainer_mounts_what_the_job_needs(tmp_path: Path) -> None:
    pyxis = SlurmConfig(container=ContainerConfig(image="reg#lab/m:1", python="python", mounts=("/data:/data",)))
    words = _srun_words(BatchExecutor(_job(slurm=pyxis, mounts=(Path("/runs/a"),))).script())
    assert "--container-image=reg#lab/m:1" in words
    assert "--container-mounts=/runs/a:/runs/a,/data:/data" in words
    assert words[-5:] == ["python", "-u", "-m", "submitit.core._submit", "/runs/a/logs/001"]
    apptainer = SlurmConfig(gpus_per_node=1, container=ContainerConfig(image="/x y.sif", runtime="apptainer"))
    words = _srun_words(BatchExecutor(_job(slurm=apptainer, mounts=(Path("/runs/a"),))).script())
    start = words.index("apptainer")
    assert words[start : start + 7] == ["apptainer", "exec", "--nv", "--bind", "/runs/a:/runs/a", "/x y.sif", "python3"]


@pytest.mark.parametrize("place", ["/runs/a:b", "/runs/a,b"])
def test_a_path_that_a_container_would_read_as_two_is_refused(place: str) -> None:
    container = ContainerConfig(image="/x.sif", runtime="apptainer")
    with pytest.raises(LaunchError, match=f"{place}: a path with a colon or a comma cannot be mounted"):
        BatchExecutor(_job(slurm=SlurmConfig(container=container), mounts=(Path(place),))).script()


def test_an_archive_is_unpacked_once_a_node_and_brings_the_python_of_the_ranks(tmp_path: Path) -> None:
    archive = tmp_path / "env.tar"
    archive.write_bytes(b"x")
    script = BatchExecutor(_job(slurm=SlurmConfig(env_archive=str(archive), node_dir="/local"))).script()
    folder = environment_folder(archive, "/local")
    (line,) = [line for line in script.splitlines() if "launch.unpack" in line]
    assert shlex.split(line)[1:4] == [
        "--nodes=$SLURM_JOB_NUM_NODES",
        "--ntasks=$SLURM_JOB_NUM_NODES",
        "--ntasks-per-node=1",
    ]
    assert script.index("launch.unpack") < script.index("submitit.core._submit")
    assert str(folder / "bin" / "python") in _srun_words(script)
    archive.write_bytes(b"xy")
    assert environment_folder(archive, "/local") != folder
    with pytest.raises(LaunchError, match=r"slurm.env_archive=/none.tar: No such file"):
        environment_folder(Path("/none.tar"), "/local")


def test_a_job_name_says_what_it_is_and_holds_nothing_that_slurm_could_misread() -> None:
    assert new_job_name("pretrain", Path("/x/my run%j|1"), "ab12") == "mimscale-pretrain-my_run_j_1-ab12"
