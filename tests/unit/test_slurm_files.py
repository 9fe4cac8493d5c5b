"""The profiles and scripts in slurm/ that nobody needs a cluster to check."""

import re
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest

from launch.profile import Profile, load_profile
from launch.slurm_profile import ContainerConfig, SlurmConfig

SLURM = Path(__file__).parents[2] / "slurm"
SCRIPTS = sorted([*SLURM.glob("*.sbatch"), *(SLURM / "devcluster").iterdir()])


@pytest.mark.parametrize("profile", sorted((SLURM / "profiles").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_profile_loads_and_explains_each_of_its_keys(profile: Path) -> None:
    assert load_profile(str(profile)).executor == "slurm"
    if profile.stem == "example":
        keys = [line for line in profile.read_text().splitlines() if re.match(r"^ *(# +)?[\w-]+:", line)]
        assert len(keys) > 30
        assert [line for line in keys if "#" not in line.lstrip(" #") and not line.endswith(":")] == []


def test_the_example_has_every_key_of_a_profile() -> None:
    named = set(re.findall(r"^ *(?:# +)?(\w+):", (SLURM / "profiles" / "example.yaml").read_text(), re.MULTILINE))
    known = {item.name for config in (Profile, SlurmConfig, ContainerConfig) for item in fields(config)}
    assert known <= named


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_is_valid_bash(script: Path) -> None:
    checked = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")
