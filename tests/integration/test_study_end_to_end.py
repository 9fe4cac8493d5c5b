"""A whole study with tiny networks: cohort, stores, pretraining, fine-tuning, scores, report."""

import json
import os
import subprocess
import sys
from pathlib import Path

from small_study import study_tree, write_study

ROOT = Path(__file__).parents[2]


def study(recipe, *words):
    variables = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "mimscale.cli", "study", str(recipe), "--json", *words]
    ended = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=280, check=False)
    assert ended.stdout, ended.stderr
    return ended.returncode, json.loads(ended.stdout), ended.stderr


def validations(node):
    lines = (Path(node["folder"]) / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "val_dice" in line]


def test_a_study_goes_from_volumes_to_tables_and_repeats_nothing(tmp_path):
    tree = study_tree(tmp_path)
    tree["finetune"]["config"]["checkpoint"] = {"every_steps": 2, "keep": 1, "keep_best": "val_dice"}
    evaluation = {**tree["evaluate"], "best": True, "flips": ["x"]}
    scoring = {"no flips": {"evaluate.flips": []}, "flips": {}}
    experiments = {**tree["experiments"], "scoring": {"question": "?", "arms": ["scratch"], "settings": scoring}}
    recipe = write_study(tmp_path, finetune=tree["finetune"], evaluate=evaluation, experiments=experiments)
    code, result, said = study(recipe, "workers=2")
    assert code == 0, said
    assert [node["state"] for node in result["nodes"]] == ["done"] * 8
    scores, differences, of_scoring, _ = result["tables"]
    assert [row[0] for row in scores["rows"]] == ["scratch", "mae"]
    for row in scores["rows"]:
        assert row[2] == "1 of 1"
        assert 0 <= float(row[3]) <= 1
    assert differences["rows"][0][:2] == ["mae", "scratch"]

    # The score on the page is the one that evaluate wrote, of the last checkpoint.
    node = next(node for node in result["nodes"] if node["label"].startswith("finetune scratch"))
    written = json.loads((Path(node["folder"]) / "evaluate" / "scores.json").read_text())
    assert written["checkpoint"] == "step_00000006"
    assert scores["rows"][0][3] == f"{written['mean']['without_background']['dice']:.3f}"
    best = written["best"]
    assert best["value"] == max(line["val_dice"] for line in validations(node) if line["step"] in (2, 4, 6))
    assert scores["columns"][4] == "Dice, best on validation"
    assert scores["rows"][0][4] == f"{best['mean']['without_background']['dice']:.3f}"
    # Another way to score the same run leaves these scores alone.
    apart = next(Path(node["folder"]) for node in result["nodes"] if "no flips" in node["label"])
    other = json.loads((apart / "scores.json").read_text())
    assert (written["settings"]["flips"], other["settings"]["flips"]) == (["x"], [])
    assert (apart / "cases.csv").exists()
    shown = {row[1]: row[3] for row in of_scoring["rows"]}
    assert shown["flips"] == scores["rows"][0][3]
    assert shown["no flips"] == f"{other['mean']['without_background']['dice']:.3f}"
    page = Path(result["report"])
    assert (page.parent / "01_main_convergence.png").exists()

    code, again, said = study(tmp_path / "recipe.yaml", "workers=2")
    assert code == 0
    assert " done] " not in said  # no node was started
    assert again["tables"] == result["tables"]

    # A recipe that scores in another way has no scores yet, though there are those of the recipe before.
    code, changed, said = study(tmp_path / "recipe.yaml", "workers=2", "evaluate.overlap=0.25", "only=[main]")
    assert code == 0
    assert [line.split("] ")[1].split(" (")[0] for line in said.splitlines() if " done] " in line] == [
        "evaluate scratch, seed 0",
        "evaluate mae, seeds 0, 0",
    ]
    written = json.loads((Path(node["folder"]) / "evaluate" / "scores.json").read_text())
    assert written["settings"]["overlap"] == 0.25
    assert changed["tables"][0]["rows"][0][3] == f"{written['mean']['without_background']['dice']:.3f}"
