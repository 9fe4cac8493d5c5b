"""What a job's processes start with, what their ends add up to, and who may submit."""

import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launch import jobs
from launch.folder import JobFolder, JobRecord, claim_folder, job_folders, refuse_while_alive
from launch.jobs import RunVerb, free_port, job_environment
from launch.plan import Plan, make_plan
from launch.profile import Profile
from launch.slurm_profile import SlurmConfig
from launch.submit import main
from launch.supervise import RankEnd, verdict
from mimscale.config import config_tree
from mimscale.errors import ConfigError, LaunchError
from mimscale.train.config import PretrainConfig
from mimscale.train.run_dir import Outcome
from mimscale.world import Process

LOCAL = Profile(executor="local", processes_per_node=2, threads_per_process=1, accelerator="cpu")


def _ends(*codes: int, killed_by_us: tuple[int, ...] = ()) -> list[RankEnd]:
    return [
        RankEnd(rank=rank, pid=100 + rank, code=code, ended_by_us=rank in killed_by_us)
        for rank, code in enumerate(codes)
    ]


@pytest.mark.parametrize(
    ("codes", "killed_by_us", "stop_sent", "code", "text"),
    [
        ((0, 0), (), False, 0, ""),
        ((75, 75), (), True, 75, "the same command continues"),
        ((0, 75), (), True, 75, "the same command continues"),
        (
            (1, -9),
            (),
            False,
            6,
            "rank 1 (process 101) by SIGKILL; SIGKILL from outside is often the kernel out of memory",
        ),
        ((-9, -11), (0,), False, 6, "rank 1 (process 101) by SIGSEGV"),
        ((-9, 3), (0,), False, 3, "rank 1 (process 101) failed with exit code 3"),
        ((6, 3), (), False, 3, "rank 1 (process 101) failed with exit code 3"),
        ((1, 6), (), False, 6, "rank 1 (process 101) failed with exit code 6"),
        ((1, 17), (), False, 17, "rank 1 (process 101) failed with exit code 17"),
        ((0, -9), (1,), False, 6, "time is up"),
        ((-12, -9), (1,), True, 75, "the same command continues"),
        ((-15, 75), (), True, 75, "the same command continues"),
        ((144, -12), (), True, 75, "the same command continues"),
        ((-12, -9), (1,), False, 6, "rank 0 (process 100) by SIGUSR2"),
    ],
)
def test_the_ends_of_the_ranks_add_up_to_one_exit_code_and_its_reason(
    codes: tuple[int, ...], killed_by_us: tuple[int, ...], stop_sent: bool, code: int, text: str
) -> None:
    ends = _ends(*codes, killed_by_us=killed_by_us)
    got, message = verdict(ends, stop_sent=stop_sent, killed_because="time is up")
    assert got == code
    assert text in message


def test_a_job_does_not_inherit_the_place_of_the_shell_that_submits_it() -> None:
    inherited = {"RANK": "3", "SLURM_PROCID": "1", "SUBMITIT_FOLDER": "x", "PATH": "/bin", "CUDA_VISIBLE_DEVICES": "2"}
    got = job_environment(inherited, chosen={"NCCL_DEBUG": "INFO"}, threads=4, accelerator="cuda")
    assert got == {
        "PATH": "/bin",
        "CUDA_VISIBLE_DEVICES": "2",
        "NCCL_DEBUG": "INFO",
        "OMP_NUM_THREADS": "4",
        "DS_ACCELERATOR": "cuda",
    }


def test_the_port_is_free_outside_the_ephemeral_range_and_not_that_of_the_job_before() -> None:
    port = free_port()
    assert port < int(jobs.EPHEMERAL_PORTS.read_text().split()[0])
    assert free_port(avoid=port) != port
    with socket.socket() as holder:
        holder.bind(("", port))
        holder.listen()
        assert free_port() != port


def test_no_free_port_is_an_error_that_names_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_is_free", lambda port: False)
    with pytest.raises(LaunchError, match=r"no free TCP port between 10000 and \d+ on "):
        free_port()


def test_what_runs_in_a_job_is_pickled_by_reference() -> None:
    task = RunVerb(arguments=("pretrain", "c.yaml"), folder=Path("/w"), environment={"A": "b"}, master_port=12345)
    pickled = pickle.dumps(task)
    assert b"launch.jobs" in pickled
    assert len(pickled) < 500
    assert pickle.loads(pickled) == task


STOPPED_VERB = """
import sys
from pathlib import Path
from launch.jobs import RunVerb
from mimscale import cli

def main(argv):
    print("at work")
    return 75

cli.VERBS["pretrain"] = ("__main__:main", "a fake")
RunVerb(arguments=("pretrain",), folder=Path.cwd(), environment={}, trains=sys.argv[1] == "trains", master_port=1)()
"""


def _run_as_rank(folder: Path, trains: bool, ranks: int) -> "subprocess.CompletedProcess[str]":
    variables = {
        "SUBMITIT_EXECUTOR": "slurm",
        "SUBMITIT_FOLDER": str(folder),
        "SLURM_JOB_ID": "100",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_NTASKS": str(ranks),
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
    }
    command = [sys.executable, "-c", STOPPED_VERB, "trains" if trains else "does not"]
    environment = {**os.environ, **variables}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(("trains", "ranks", "code"), [(True, 2, 0), (True, 1, 75), (False, 2, 75)])
def test_ranks_that_stop_together_leave_with_0_only_where_an_outcome_says_that_they_stopped(
    tmp_path: Path, trains: bool, ranks: int, code: int
) -> None:
    done = _run_as_rank(tmp_path, trains, ranks)
    assert done.returncode == code, done.stderr
    assert "at work" in done.stdout


def test_a_rank_of_a_job_that_was_cancelled_while_its_ranks_were_started_does_not_begin(tmp_path: Path) -> None:
    JobFolder(tmp_path).cancelled.write_text("{}")  # it is there before the signal, which finds no rank yet
    done = _run_as_rank(tmp_path, True, 1)
    assert done.returncode == 75, done.stderr
    assert "at work" not in done.stdout
    assert "cancelled before it began" in done.stderr


def test_a_process_with_the_id_of_a_dead_one_is_not_taken_for_it() -> None:
    me = Process.of(os.getpid())
    assert me.is_alive()
    assert not Process(pid=me.pid, host=me.host, start_ticks=me.start_ticks - 1).is_alive()
    assert not Process(pid=me.pid, host="elsewhere", start_ticks=me.start_ticks).is_alive()


def test_a_zombie_is_not_alive() -> None:
    child = subprocess.Popen(["true"])
    process = Process.of(child.pid)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not process.is_alive()
    child.wait()


def _record(submitter: Process) -> JobRecord:
    return JobRecord(
        verb="pretrain",
        executor="local",
        processes=2,
        master_port=12345,
        config_hash="",
        timeout_min=None,
        signal_lead_s=60.0,
        lost_rank_grace_s=10.0,
        trains=True,
        submitted_utc="2026-01-01T00:00:00Z",
        submitter=submitter,
    )


GONE = Process(pid=os.getpid(), host=socket.gethostname(), start_ticks=-1)


def test_a_job_record_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    folder = claim_folder(tmp_path, _record(GONE), "a: 1\n")
    assert folder.read() == _record(GONE)
    assert folder.config.read_text() == "a: 1\n"


def test_folders_are_numbered_and_what_a_killed_submission_left_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / f".tmp-{os.getpid()}").mkdir()
    (tmp_path / f".tmp-{os.getpid()}" / "rubbish").write_text("x")
    names = [claim_folder(tmp_path, _record(GONE), "").path.name for _ in range(3)]
    assert names == ["001", "002", "003"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_submission_under_way_holds_the_place_and_the_refused_one_leaves_nothing(tmp_path: Path) -> None:
    first = claim_folder(tmp_path, _record(Process.of(os.getpid())), "")
    with pytest.raises(LaunchError, match=f"a submission .pretrain, {first.path}. is alive as process {os.getpid()}"):
        claim_folder(tmp_path, _record(Process.of(os.getpid())), "")
    assert [folder.path for folder in job_folders(tmp_path)] == [first.path]


def test_a_job_is_alive_by_its_ranks_when_its_supervisor_is_gone_until_its_outcome_is_written(tmp_path: Path) -> None:
    folder = claim_folder(tmp_path, _record(GONE), "")
    refuse_while_alive(tmp_path, [folder])
    folder.write_ranks([GONE, Process.of(os.getpid())])
    with pytest.raises(LaunchError, match=f"`kill -USR2 {os.getpid()}`"):
        refuse_while_alive(tmp_path, [folder])
    folder.settle(Outcome(outcome="failed", exit_code=6, step=3))
    refuse_while_alive(tmp_path, [JobFolder(folder.path)])


def _pretrain_tree(**changes: object) -> dict[str, object]:
    config = PretrainConfig(
        store=Path("store"),
        run_dir=Path("run"),
        steps=4,
        global_batch=12,
        micro_batch=2,
        crop_voxels=(32, 32, 32),
        patch_voxels=(16, 16, 16),
    )
    return {**config_tree(config), **changes}


def test_topology_says_how_the_global_batch_is_made() -> None:
    plan = make_plan("pretrain", _pretrain_tree(), LOCAL, nodes=1, processes=None)
    assert plan.topology() == {
        "executor": "local",
        "accelerator": "cpu",
        "nodes": 1,
        "processes": 2,
        "threads_per_process": 1,
        "micro_batch": 2,
        "accumulation": 3,
        "global_batch": 12,
    }


def test_a_site_names_the_folder_for_copies_of_packs_and_a_recipe_another() -> None:
    site = Profile(executor="slurm", timeout_min=60, slurm=SlurmConfig(stage_dir="/local/nvme"))
    plan = make_plan("pretrain", _pretrain_tree(), site, nodes=1, processes=1)
    assert plan.trains is not None
    assert plan.trains.stream.stage_dir == Path("/local/nvme")
    assert "stage_dir: /local/nvme" in plan.text
    own = {**plan.tree["stream"], "stage_dir": "/mine"}
    plan = make_plan("pretrain", _pretrain_tree(stream=own), site, nodes=1, processes=1)
    assert "stage_dir: /mine" in plan.text
    assert make_plan("evaluate", {"run_dir": "run"}, site, nodes=1, processes=None).tree == {"run_dir": "run"}


def test_an_impossible_number_of_processes_is_refused_with_the_legal_ones() -> None:
    with pytest.raises(ConfigError, match="does not divide among 4 ranks; legal rank counts are 1, 2, 3, 6"):
        make_plan("pretrain", _pretrain_tree(), LOCAL, nodes=1, processes=4)


def test_more_than_one_node_needs_another_executor() -> None:
    with pytest.raises(ConfigError, match="--nodes 2: the local executor runs on this machine alone; say --nodes 1"):
        make_plan("pretrain", _pretrain_tree(), LOCAL, nodes=2, processes=None)


@pytest.mark.parametrize(("executor", "processes"), [("local", 0), ("debug", 2)])
def test_a_number_of_processes_that_the_executor_cannot_start_is_refused(executor: str, processes: int) -> None:
    profile = Profile(executor=executor)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"--processes {processes}: at least 1, and exactly 1 for the debug executor"):
        make_plan("pretrain", _pretrain_tree(), profile, nodes=1, processes=processes)


def test_a_verb_that_does_not_train_runs_as_one_process_with_its_files_beside_its_output() -> None:
    plan = make_plan("ingest", {"out": "data/store", "sources": []}, LOCAL, nodes=1, processes=None)
    assert plan.world_size == 1
    assert plan.run.path == Path.cwd() / "data" / "store.job"
    assert "micro_batch" not in plan.topology()


def test_a_verb_that_is_no_job_is_refused_with_those_that_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        main(["recipes"])
    assert leave.value.code == 2
    assert "invalid choice: 'recipes' (choose from" in capsys.readouterr().err


def test_a_mistake_in_the_config_is_refused_with_the_exit_code_of_the_verb(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("stepps: 3\n")
    assert main(["pretrain", "recipe.yaml", "--dry-run"]) == 2
    assert "stepps" in capsys.readouterr().err


def test_fresh_data_reaches_the_verb_that_has_an_order_of_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = []

    def remember(plan: Plan, **_: object) -> None:
        plans.append(plan)
        raise LaunchError("far enough")

    monkeypatch.setattr("launch.submit.prepare", remember)
    words = ["demo/pretrain", f"store={tmp_path}", f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(LaunchError, match="far enough"):
        main(["pretrain", *words, "--profile", "debug", "--fresh-data"])
    with pytest.raises(LaunchError, match="far enough"):
        main(["pretrain", *words, "--profile", "debug"])
    assert [plan.words for plan in plans] == [("--fresh-data",), ()]
    with pytest.raises(ConfigError, match="--fresh-data: ingest has no order of data"):
        main(["ingest", "demo/ingest", "sources=/none", f"out={tmp_path / 'store'}", "--fresh-data"])
