"""The demo in small: every verb of the main job, by its command line, on a real volume at 4 mm and subjects of it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mimscale import cli

# The first test waits for all runs of the fixture.
pytestmark = [pytest.mark.two_process, pytest.mark.timeout(600)]

CHECKOUT = Path(__file__).parents[2]
SMALL = [
    "crop_voxels=[24, 24, 24]",
    "model={dim: 36, depth: 2, heads: 2}",
    "validation={every_steps: 10}",
    "optim.warmup_steps=1",
]


def mimscale(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mimscale.cli", *words]
    process = subprocess.Popen(
        command,
        cwd=CHECKOUT,  # as a developer calls it: the code that a job must not import lies right there
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = process.communicate(timeout=150)
    except BaseException:
        end(process)
        raise
    assert process.returncode == 0, f"{words}\n{out}\n{err}"
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def end(process: subprocess.Popen[str]) -> None:
    """End a command and, when it is `submit --wait`, its job, which has a session of its own. Shows what it said."""
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    process.send_signal(signal.SIGINT)  # the second ends the job at once, with the stacks of its ranks
    try:
        _, shown = process.communicate(timeout=30)
    finally:
        process.kill()
    print(shown, file=sys.stderr)


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("job")
    mimscale("cohort", f"out={root}/cohort", "subjects=3", "seed=3", "spacing_mm=4")
    mimscale("ingest", "demo/ingest", f"sources={root}/cohort/dataset.json", f"out={root}/store", "val_fraction=0.5")
    store = f"store={root}/store"
    pretrain = ["pretrain", "demo/pretrain", store, f"run_dir={root}/pretrain", "steps=12", *SMALL]
    mimscale("submit", *pretrain, "mae={decoder_dim: 36, decoder_depth: 1, decoder_heads: 2}", "--wait")
    finetune = ["submit", "finetune", "demo/finetune", store, "steps=12", *SMALL, "unetr.feature_size=4", "--wait"]
    (root / "finetune.err").write_text(
        mimscale(*finetune, f"run_dir={root}/finetune", f"init_from={root}/pretrain").stderr
    )
    (root / "scratch.err").write_text(mimscale(*finetune, f"run_dir={root}/scratch").stderr)
    return root


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_each_run_finishes_with_the_documented_metrics(job):
    for arm in ("pretrain", "finetune", "scratch"):
        assert json.loads((job / arm / "outcome.json").read_text())["outcome"] == "finished"
        lines = [line for line in metrics(job / arm) if "loss" in line]
        assert [line["step"] for line in lines] == list(range(1, 13))
        assert {"lr", "samples_per_s", "data_wait_s", "step_s", "grad_norm"} <= lines[0].keys()
        losses = [line["loss"] for line in lines]
        beat = json.loads((job / arm / "heartbeat.json").read_text())
        assert (beat["step"], beat["steps"], beat["loss"]) == (12, 12, losses[-1])
        assert 0 < time.time() - beat["time_s"] < 600
        assert sum(losses[-4:]) < sum(losses[:4])  # crops differ from step to step, so single losses do not compare
    assert any("val_dice" in line for line in metrics(job / "finetune"))


def test_tensorboard_shows_the_losses_of_metrics_jsonl(job):
    for arm in ("pretrain", "finetune", "scratch"):
        events = EventAccumulator(str(job / arm / "tensorboard"))
        events.Reload()
        shown = [(event.step, event.value) for event in events.Scalars("loss")]
        written = [(line["step"], np.float32(line["loss"])) for line in metrics(job / arm) if "loss" in line]
        assert shown == written  # events hold float32


def test_a_job_runs_a_copy_of_the_code_and_says_so(job):
    record = json.loads((job / "pretrain" / "env.json").read_text())
    code = Path(record["code"])
    assert code.parent == job / "pretrain" / "code"
    assert (code / "mimscale" / "cli.py").read_bytes() == Path(cli.__file__).read_bytes()
    assert record["packages"]["torch"]
    assert record["environment"]["OMP_NUM_THREADS"]


def test_the_transfer_is_reported_and_both_arms_follow_the_same_plan(job):
    assert "encoder from" in (job / "finetune.err").read_text()
    assert "from scratch" in (job / "scratch.err").read_text()
    plans = [
        json.loads(
            (job / arm / "checkpoints" / "newest")
            .parent.joinpath((job / arm / "checkpoints" / "newest").read_text().strip(), "manifest.json")
            .read_text()
        )["position"]
        for arm in ("finetune", "scratch")
    ]
    assert plans[0] == plans[1]


def test_whole_volumes_are_scored_and_predicted_on_the_source_grid(job):
    scores = json.loads(
        mimscale("evaluate", f"run_dir={job}/finetune", f"store={job}/store", "overlap=0.25", "--json").stdout
    )
    assert scores["per_class"].keys() == {"background", "grey matter", "white matter"}
    saved = json.loads((job / "finetune" / "evaluate" / "scores.json").read_text())
    for case in saved["cases"]:
        for name in ("grey matter", "white matter"):
            assert 0 <= case["scores"][name]["dice"] <= 1
            assert case["scores"][name].keys() >= {"dice", "hd95_mm", "nsd"}
            assert case["store_grid_scores"][name]["dice"] == case["scores"][name]["dice"]
    predictions = sorted((job / "finetune" / "evaluate" / "predictions").glob("*.nii.gz"))
    source = nibabel.load(next((job / "cohort" / "imagesTr").glob("*.nii.gz")))
    assert predictions
    for path in predictions:
        prediction = nibabel.load(path)
        assert prediction.shape == source.shape
        np.testing.assert_allclose(prediction.affine, source.affine, atol=1e-5)


def test_the_report_shows_all_three_runs(job):
    mimscale("evaluate", f"run_dir={job}/pretrain", f"store={job}/store")
    mimscale("evaluate", f"run_dir={job}/scratch", f"store={job}/store", "overlap=0.25")
    mimscale("report", *(f"{job}/{arm}" for arm in ("pretrain", "finetune", "scratch")), f"out={job}/report")
    page = (job / "report" / "index.html").read_text()
    assert all(arm in page for arm in ("pretrain", "finetune", "scratch"))
    assert "derived" in page
    assert list((job / "report").glob("*.png"))


def test_an_exported_encoder_starts_a_run_as_its_run_directory_does(job):
    mimscale("export", f"{job}/pretrain", f"{job}/exported")
    words = ["demo/finetune", f"store={job}/store", f"run_dir={job}/from_export", f"init_from={job}/exported"]
    mimscale("finetune", *words, "steps=2", *SMALL, "unetr.feature_size=4")
    ours, theirs = (
        next(line for line in metrics(job / arm) if line["step"] == 1) for arm in ("from_export", "finetune")
    )
    # One rank here, two there: the same global batch, summed in another order.
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
