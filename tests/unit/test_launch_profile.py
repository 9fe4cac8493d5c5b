"""Profiles: what may stand in one, and what follows from it."""

import os
from pathlib import Path

import pytest

from launch import profile as profiles
from launch.profile import Profile, load_profile, resolve_accelerator, resolve_processes, resolve_threads
from mimscale.errors import ConfigError


@pytest.mark.parametrize("name", ["local", "debug"])
def test_every_packaged_profile_is_valid(name: str) -> None:
    assert load_profile(name).executor == name


def test_a_profile_is_read_from_a_file_of_the_site(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text("executor: local\nprocesses_per_node: 8\nenvironment: {NCCL_DEBUG: INFO}\n")
    profile = load_profile(str(file))
    assert (profile.processes_per_node, profile.environment) == (8, {"NCCL_DEBUG": "INFO"})


def test_an_unknown_profile_is_refused_with_the_packaged_names() -> None:
    with pytest.raises(ConfigError, match="mysite: no such file and no packaged profile; packaged are: debug, local"):
        load_profile("mysite")


def test_every_wrong_and_unknown_key_is_named_at_once(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text("executor: loccal\nprocess_per_node: 2\nenvironment: {NCCL_DEBUG: 1}\n")
    with pytest.raises(ConfigError) as error:
        load_profile(str(file))
    for text in ("3 problem(s)", "executor", "'loccal'", "process_per_node", "environment.NCCL_DEBUG"):
        assert text in str(error.value)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"processes_per_node": 0}, "profile.processes_per_node=0: must be above 0"),
        ({"timeout_min": 1.0, "signal_lead_s": 60.0}, "not longer than signal_lead_s=60.0"),
        ({"environment": {"RANK": "3"}}, "profile.environment.RANK is set by the launcher"),
        ({"environment": {"OMP_NUM_THREADS": "3"}}, "use threads_per_process"),
        ({"executor": "debug", "processes_per_node": 2}, "the debug executor runs one process; use local"),
    ],
)
def test_a_value_that_cannot_work_is_refused_with_the_way_out(fields: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Profile(**{"executor": "local", **fields})  # type: ignore[arg-type]


def test_the_accelerator_is_what_the_profile_says_then_what_the_shell_says_then_what_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    auto = Profile(executor="local")
    monkeypatch.setattr(profiles, "visible_gpus", lambda environment: 4)
    assert resolve_accelerator(auto, {}) == "cuda"
    assert resolve_accelerator(auto, {"DS_ACCELERATOR": "cpu"}) == "cpu"
    assert resolve_accelerator(Profile(executor="local", accelerator="cpu"), {"DS_ACCELERATOR": "cuda"}) == "cpu"
    monkeypatch.setattr(profiles, "visible_gpus", lambda environment: 0)
    assert resolve_accelerator(auto, {}) == "cpu"


def test_an_accelerator_of_the_shell_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ConfigError, match="DS_ACCELERATOR=tpu: expected cpu or cuda"):
        resolve_accelerator(Profile(executor="local"), {"DS_ACCELERATOR": "tpu"})


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_gpus_do_not_count(hidden: str) -> None:
    assert profiles.visible_gpus({"CUDA_VISIBLE_DEVICES": hidden}) == 0


def test_gpus_are_counted_as_the_processes_will_see_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: A (UUID: a)'\necho 'GPU 1: B (UUID: b)'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert profiles.visible_gpus({}) == 2
    assert profiles.visible_gpus({"CUDA_VISIBLE_DEVICES": "3"}) == 1


def test_one_process_per_gpu_two_without_and_always_what_the_profile_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "visible_gpus", lambda environment: 4)
    auto = Profile(executor="local")
    assert resolve_processes(auto, "cuda", {}) == 4
    assert resolve_processes(auto, "cpu", {}) == 2
    assert resolve_processes(Profile(executor="local", processes_per_node=3), "cuda", {}) == 3
    assert resolve_processes(Profile(executor="debug"), "cuda", {}) == 1


def test_the_usable_cores_are_shared_out_and_nobody_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    auto = Profile(executor="local")
    assert [resolve_threads(auto, processes) for processes in (1, 2, 3, 32)] == [16, 8, 5, 1]
    assert resolve_threads(Profile(executor="local", threads_per_process=7), 2) == 7
