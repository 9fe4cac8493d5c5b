"""The README tells the truth about the tree and the commands."""

import re
import shlex
from pathlib import Path

import pytest

from mimscale.cli import VERBS, main
from mimscale.config import recipe_names

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def tree_paths() -> list[str]:
    block = README.split("## What is where")[1].split("```")[1].strip()
    paths, folder = [], ""
    for line in block.splitlines():
        name = line.split()[0]
        if line.startswith("  "):
            paths.append(folder + name)
        else:
            paths.append(name)
            folder = name
    return paths


def commands() -> list[list[str]]:
    lines = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("mimscale ")]


def test_every_path_of_the_tree_exists():
    missing = [path for path in tree_paths() if not (ROOT / path).exists()]
    assert not missing


def test_the_tree_names_every_part_of_the_package():
    parts = {
        f"mimscale/{path.name}" + ("/" if path.is_dir() else "")
        for path in (ROOT / "mimscale").iterdir()
        if not path.name.startswith("__")
    }
    assert parts <= set(tree_paths())


def test_the_method_of_ones_own_is_the_one_that_is_tested_and_takes_30_lines():
    file = (ROOT / "tests" / "fill_method.py").read_text().splitlines()
    lines = [line for line in file[1:] if line.strip()]
    block = README.split("### A method of your own")[1].split("```python\n")[1].split("```")[0]
    assert [line for line in block.splitlines() if line.strip()] == lines
    assert len(lines) <= 30


def test_every_verb_is_described_and_every_command_has_a_verb():
    described = README.split("## Verbs")[1].split("## ")[0]
    assert all(re.search(rf"\b{verb}\b", described) for verb in VERBS)
    assert commands()
    assert all(words[1] in VERBS for words in commands())


def test_every_recipe_that_the_readme_names_is_packaged():
    named = set()
    for words in commands():
        verb_words = words[2:] if words[1] == "submit" else words[1:]
        if verb_words[0] in ("ingest", "pretrain", "finetune"):
            named.add(verb_words[1])
    assert named
    assert named <= recipe_names().keys()


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_key_and_value_that_the_readme_gives_is_one_that_the_verb_takes(words, capsys, tmp_path, monkeypatch):
    for name, profile in (("mysite.yaml", "example.yaml"), ("cpu.yaml", "devcluster.yaml")):
        (tmp_path / name).write_text((ROOT / "slurm" / "profiles" / profile).read_text())
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")
    monkeypatch.chdir(tmp_path)
    _, verb, *rest = (word for word in words if word not in ("--wait", "--dry-run"))
    if verb in ("ingest", "pretrain", "finetune", "evaluate", "predict", "extract", "probe"):
        assert main([verb, *rest, "--check"]) == 0, capsys.readouterr().err
    elif verb == "submit":
        assert main([verb, *rest, "--dry-run"]) == 0, capsys.readouterr().err
