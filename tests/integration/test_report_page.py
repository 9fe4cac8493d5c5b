import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from fake_runs import add_reconstruction_scores, add_segmentation_scores, fake_run
from matplotlib.image import imread
from small_segmentation import SOURCES, make_store

from mimscale.cli import main
from mimscale.report.run import write_report
from mimscale.train.health_log import HealthLog

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Checks that tags nest, and gathers text, links and pictures."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.pictures, self.links, self.ids, self.alts = [], "", [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.pictures.append(attributes["src"])
            self.alts.append(attributes["alt"])
        if tag == "a":
            self.links.append(attributes["href"])
        if "id" in attributes:
            self.ids.append(attributes["id"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data + " "

    @property
    def words(self):
        return " ".join(self.text.split())


def read(path):
    return Page(path.read_text())


def cohort_store(folder):
    """A store whose sources are a cohort of one real and two derived volumes."""
    store = make_store(folder)
    subjects = {"aaaa": {"kind": "real", "origin": "an average of 152 people"}}
    subjects |= {name: {"kind": "derived", "from": "aaaa"} for name in ("bbbb", "cccc")}
    (folder / "sources" / "cohort.json").write_text(json.dumps({"seed": 1, "subjects": subjects}))
    lines = [
        {"id": name, "outcome": "stored", "source": str(folder / "sources" / f"{name}.nii.gz")} for name in SOURCES
    ]
    (folder / "store.sources.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return store


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    store = str(cohort_store(folder / "data"))
    pretrain = fake_run(folder / "pretrain", steps=120, store=store)
    add_reconstruction_scores(pretrain, volumes=["aaaa"])
    for name, dice in (("finetune", 0.8125), ("scratch", 0.6875)):
        run = fake_run(folder / name, "finetune", store=store, **({} if name == "scratch" else {"init_from": "p"}))
        add_segmentation_scores(run, volumes=["aaaa", "bbbb"], dice=dice)
    for name in ("pretrain", "finetune", "scratch"):
        scores = folder / name / "evaluate" / "scores.json"
        scores.write_text(json.dumps(json.loads(scores.read_text()) | {"store": store}))
    write_report([folder / name for name in ("pretrain", "finetune", "scratch")], folder / "out")
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return read(folder / "out" / "index.html")


def test_every_picture_of_the_page_is_a_file_beside_it_and_no_blank(folder, page):
    assert len(page.pictures) == 5 + 1 + 2 * 2
    for name in page.pictures:
        assert "/" not in name
        assert imread(folder / "out" / name)[..., :3].std() > 0.05, name
    assert all(page.alts)


def test_the_page_loads_nothing_from_elsewhere_and_runs_no_script(folder):
    text = (folder / "out" / "index.html").read_text()
    assert not re.search(r"https?://|//cdn|<script|<link|@import|url\(|srcset", text)


def test_no_column_of_the_page_is_wider_than_a_phone(folder):
    style = (folder / "out" / "index.html").read_text().split("<style>")[1].split("</style>")[0]
    least = re.findall(r"(?:minmax\(|min-width: *|(?<!max-)\bwidth: *)([\d.]+px|min\([^)]*\))", style)
    assert least
    for width in least:
        assert "100%" in width or float(width.removesuffix("px")) <= 320, width


def test_links_of_the_page_lead_to_its_sections(page):
    assert all(link.removeprefix("#") in page.ids for link in page.links)


def test_real_and_derived_volumes_are_told_apart_in_words(page):
    assert "2 of these 3 volumes are derived, 1 is real." in page.words
    assert "Derived volumes were computed from aaaa.nii.gz" in page.words
    assert "They are no patients." in page.words
    assert "aaaa.nii.gz is an average of 152 people." in page.words
    assert "say nothing about patients" in page.words
    assert "2 whole val volume(s), 1 of them derived" in page.words


def test_scores_on_the_page_are_those_of_the_files(page):
    assert "0.812 +/- 0.010" in page.words
    assert "0.688 +/- 0.010" in page.words
    assert "0.1234" in page.words
    assert "0.4321" in page.words
    assert "from scratch" in page.words


def test_samples_a_second_and_data_wait_are_shown(page):
    assert "16.00" in page.words
    assert "10.0 %" in page.words


def test_the_jobs_of_a_run_are_listed(tmp_path):
    run = fake_run(tmp_path / "run", store="gone")
    job = {"job_id": "4711", "executor": "local", "processes": 2, "folder": "logs/001", "submitted_utc": "2026-01-02"}
    (run / "jobs.jsonl").write_text(json.dumps(job) + "\n")
    assert "run 2026-01-02 local 2 4711 logs/001" in read(write_report([run], tmp_path / "out")).words


def test_what_was_wrong_with_a_run_is_said_and_counted(tmp_path):
    run = fake_run(tmp_path / "run", store="gone")
    log = HealthLog(run / "health.jsonl")
    for step in (3, 5):
        log.append(step, "skipped", f"step {step}: the loss is <nan>")
    log.append(9, "slow_rank", "rank 3 on node7 needs 2 s")
    words = read(write_report([run], tmp_path / "out")).words
    assert "run, health.jsonl: 2 skipped, 1 slow rank. The last: rank 3 on node7 needs 2 s" in words


def test_a_pretraining_run_is_shown_beside_predictors_without_a_network(folder, page):
    assert "Validation loss divided by that of two predictors without a network" in page.words
    assert "pretrain_yardsticks.png" in page.pictures


def test_hidden_patches_are_painted_and_the_reconstruction_is_below(folder):
    picture = imread(folder / "out" / "pretrain_reconstruction_aaaa_0.png")[..., :3]
    third = picture.shape[0] // 3
    coloured = [(np.ptp(part, axis=2) > 0.1).mean() for part in (picture[:third], picture[third:])]
    assert coloured[0] > 0.2
    assert coloured[1] < 0.02


def test_the_same_runs_give_the_same_pictures(folder):
    write_report([folder / "pretrain"], folder / "again")
    for name in ("pretrain_loss.png", "pretrain_reconstruction_aaaa_0.png"):
        assert (folder / "again" / name).read_bytes() == (folder / "out" / name).read_bytes()


def test_a_run_without_steps_scores_or_store_says_so_plainly(tmp_path, capsys):
    run = fake_run(tmp_path / "run", steps=5, store=str(tmp_path / "gone"))
    (run / "metrics.jsonl").unlink()
    (run / "outcome.json").unlink()
    assert main(["report", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"page": str(run / "report" / "index.html")}
    page = read(run / "report" / "index.html")
    assert page.pictures == []
    for text in ("No step has been logged yet", "Not evaluated", "not readable now", "not ended", "0 of 5"):
        assert text in page.words


def test_a_finetune_run_that_was_not_evaluated_names_the_command(tmp_path):
    run = fake_run(tmp_path / "run", "finetune", steps=20, store=str(tmp_path / "gone"))
    page = read(write_report([run], tmp_path / "out"))
    assert f"mimscale evaluate run_dir={run}" in page.words
    assert "finetune_loss.png" in page.pictures


def test_names_from_files_cannot_become_markup(tmp_path):
    run = fake_run(tmp_path / "run", store="<b>store</b>", outcome="failed")
    (run / "outcome.json").write_text(
        json.dumps({"outcome": "failed", "exit_code": 3, "step": 40, "message": "<script>alert(1)</script>"})
    )
    text = write_report([run], tmp_path / "out").read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_runs_with_the_same_folder_name_are_told_apart(tmp_path):
    runs = [fake_run(tmp_path / parent / "run", store="gone") for parent in ("a", "b")]
    assert "a_run, b_run" in read(write_report(runs, tmp_path / "out")).words


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "expected RUN_DIR [RUN_DIR ...] [out=DIR]"),
        (["{tmp}", "to=x"], "expected RUN_DIR [RUN_DIR ...] [out=DIR]"),
        (["{tmp}"], "no config.yaml, so this is no run directory"),
    ],
)
def test_a_wrong_command_line_is_explained(words, text, tmp_path, capsys):
    assert main(["report", *(word.format(tmp=tmp_path) for word in words)]) == 2
    assert text in capsys.readouterr().err
