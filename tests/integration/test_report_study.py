"""The page of a study, opened in a real browser: pictures load, tables sort, nothing complains."""

import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
from conftest import skip_unless
from fake_runs import CLASSES, add_reconstruction_scores, add_segmentation_scores, fake_run
from small_segmentation import make_store
from small_study import study_tree

from mimscale.config import build_config, config_tree
from mimscale.report.study_markdown import study_markdown
from mimscale.study.config import StudyConfig
from mimscale.study.graph import expand
from mimscale.study.nodes import resolve
from mimscale.study.view import NodeState, study_view, write_study_report

DICE = {"scratch": 0.5, "mae": 0.75}
# Of the code that pretrained, trained and scored: each is another one, and one is not all committed.
PRETRAINED_BY, TRAINED_BY, SCORED_BY = "b" * 40 + "-dirty", "a" * 40, "c" * 40
# Put into a copy of the page: what went wrong, before anything else runs; and what there is, after all has run.
WATCH = """<script>
window.problems = [];
window.addEventListener("error", (event) => problems.push(event.message || "did not load: " + event.target.src), true);
console.error = (text) => problems.push("console: " + text);
</script>"""
ASK = """<script>
window.addEventListener("load", () => {
  const column = (table, index) => Array.from(table.tBodies[0].rows).map((row) => row.cells[index].textContent);
  const heads = Array.from(document.querySelector("table.sortable").querySelectorAll("th"));
  const dice = heads.findIndex((head) => head.textContent === "Dice"), orders = [];
  const table = heads[0].closest("table");
  for (const index of [dice, dice, 0]) { heads[index].click(); orders.push([column(table, index), column(table, 0)]); }
  const answer = document.createElement("pre");
  answer.id = "answer";
  answer.textContent = JSON.stringify({
    problems, orders, sorted: heads[0].getAttribute("aria-sort"),
    images: Array.from(document.images).map((image) => [image.getAttribute("src"), image.naturalWidth]),
    dead_links: Array.from(document.querySelectorAll("nav a"), (a) => a.getAttribute("href"))
      .filter((place) => !document.querySelector(place)).length,
  });
  document.body.append(answer);
});
</script>"""


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study whose runs are made up, two seeds of each stage; one node has failed."""
    folder = tmp_path_factory.mktemp("study")
    store = make_store(folder / "data")
    tree = study_tree(
        folder,
        data={"store": {"path": str(store)}},
        pretrain_seeds=[0, 1],
        finetune_seeds=[0, 1],
        reconstructions=True,
        arms={"scratch": {}, "mae": {"pretrain": {}}, "<b>broken</b>": {"pretrain": {"seed": 5, "steps": 3}}},
        experiments={
            "main": {"question": "Does pretraining help?", "arms": ["scratch", "mae", "<b>broken</b>"]},
            "mask": {
                "question": "What does the ratio do?",
                "arms": ["mae"],
                "settings": {"0.5": {"pretrain.mask.ratio": 0.5}, "0.75": {"pretrain.mask.ratio": 0.75}},
            },
        },
    )
    config = build_config(StudyConfig, tree, "test")
    graph, states = expand(config), {}
    for node in graph.nodes.values():
        place = graph.folder(folder / "study", node)
        trials = [trial for trial in graph.trials if node.id in (trial.pretrain, trial.finetune, trial.evaluate)]
        if node.verb == "pretrain" and trials[0].arm == "<b>broken</b>":
            states[node.id] = NodeState("failed", "loss is not finite <script>alert(1)</script>", 1)
            continue
        if any(states[parent].name != "done" for parent in node.parents):
            states[node.id] = NodeState("left out", "its pretraining has no result")
            continue
        states[node.id] = NodeState("done", "")
        if node.verb in ("pretrain", "finetune"):
            fake_run(place, node.verb)
            (place / "config.yaml").write_text(json.dumps(config_tree(resolve(graph, folder / "study", node))))
            commit = PRETRAINED_BY if node.verb == "pretrain" else TRAINED_BY
            if node.label != "finetune scratch, seed 1":  # of this one nobody wrote down what it ran
                (place / "env.json").write_text(json.dumps({"commit": commit}))
        elif trials:
            seed = trials[0].finetune_seed
            dice = DICE[trials[0].arm] + 0.01 * seed
            scores = add_segmentation_scores(place, volumes=["aaaa", "bbbb"], dice=dice)
            (place / "evaluate" / "scores.json").write_text(json.dumps({**scores, "commit": SCORED_BY}))
        else:
            add_reconstruction_scores(place, volumes=["aaaa"])
    view = study_view(config, graph, folder / "study", states)
    return folder, view, write_study_report(view, folder / "study")


def browser():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-headless-shell", "google-chrome"))), None)
    skip_unless(found is not None, "no Chromium (apt-get install chromium)")
    return found


def test_a_browser_shows_every_picture_and_sorts_tables_without_complaint(study, tmp_path):
    page = study[2]
    text = page.read_text()
    probe = page.with_name("probe.html")
    probe.write_text(text.replace("<head>", "<head>" + WATCH, 1).replace("</body>", ASK + "</body>"))
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={tmp_path}"]
    ended = subprocess.run(
        [browser(), *words, "--virtual-time-budget=5000", "--dump-dom", probe.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert ":CONSOLE" not in ended.stderr
    answer = json.loads(re.search(r'<pre id="answer">(.*?)</pre>', ended.stdout, re.DOTALL)[1])
    assert answer["problems"] == []
    assert answer["dead_links"] == 0
    assert len(answer["images"]) == 2 + 1 + 3 + 2 * 2  # curves, settings, reconstructions, overlays
    assert all(width > 100 for _, width in answer["images"])
    (up, arms_up), (down, arms_down), (names, _) = answer["orders"]
    assert [value[:5] for value in up] == ["0.505", "0.755", "n/a"]
    assert [value[:5] for value in down] == ["0.755", "0.505", "n/a"]  # what is no number stays last
    assert (arms_up[0], arms_down[0]) == ("scratch", "mae")
    assert names == sorted(names)
    assert answer["sorted"] == "ascending"


def test_names_and_reasons_cannot_become_markup(study):
    text = study[2].read_text()
    assert "<script>alert" not in text
    assert "<b>broken" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_the_page_loads_nothing_from_elsewhere(study):
    assert not re.search(r"https?://|//cdn|@import|url\(|srcset|<script src", study[2].read_text())


def test_numbers_are_means_over_seeds_with_their_spread_and_paired_differences(study):
    _, view, _ = study
    main = view.sections[0]
    scores = {row[0]: row for row in main.tables[0].rows}
    assert scores["scratch"][2:4] == ["2 of 2", "0.505 +/- 0.007"]
    assert scores["mae"][2:4] == ["4 of 4", "0.755 +/- 0.006"]
    assert scores["<b>broken</b>"][2:4] == ["0 of 4", "n/a"]
    (difference,) = [row for row in main.tables[1].rows if row[0] == "mae"]
    assert difference[1:5] == ["scratch", "+0.250", "[+0.250, +0.250]", "2 x 2, 2 cases"]
    # All made-up runs reach the target at their last step, after 20 s and, with pretraining, after 40 s.
    assert difference[5:] == ["1.00 [1.00, 1.00]", "0.50 [0.50, 0.50]"]
    assert main.answers[0].endswith(
        "; the target is reached 1.00 [1.00, 1.00] times as fast in steps, not shown to differ, and 0.50 [0.50, 0.50] "
        "with the time of pretraining, later for 2 x 2 seeds, too few to speak of others."
    )
    assert "not measured yet" in " ".join(main.answers)
    own = "the volumes to val of each run's own store"
    assert f"Scoring: {own}, crop_voxels [64, 64, 64], overlap 0.5, nsd_tolerance_mm 2.0." in main.tables[0].note
    assert [table.title for table in main.classes] == [
        "Dice of each class",
        "HD95 of each class, mm",
        "NSD of each class",
    ]
    # The background has no surface: no line of nothing but n/a.
    assert [[row[0] for row in table.rows] for table in main.classes] == [CLASSES, CLASSES[1:], CLASSES[1:]]


def test_every_number_leads_to_its_runs_seeds_configs_commits_and_volumes(study):
    _, view, page = study
    (table,) = view.provenance
    row = dict(zip(table.columns, next(row for row in table.rows if row[1] == "mae"), strict=True))
    assert row["pretraining seed"] == "0"
    assert row["checkpoint"] == "step_00000040"
    assert (page.parents[1] / "nodes" / row["fine-tuning"] / "config.yaml").exists()
    assert (page.parents[1] / "nodes" / row["pretraining"] / "config.yaml").exists()
    assert row["commit"] == "aaaaaaaaaaaa, bbbbbbbbbbbb-dirty, cccccccccccc"
    commits = [r[table.columns.index("commit")] for r in table.rows if r[1] == "scratch"]
    assert commits == ["aaaaaaaaaaaa, cccccccccccc", "cccccccccccc, unknown"]
    configs = dict(view.configs)
    assert "title: A study of seconds\n" in configs["the study's recipe, resolved"]
    for name, what in ((row["fine-tuning"], "finetune mae, seeds 0, 0"), (row["pretraining"], "pretrain mae, seed 0")):
        assert configs[f"{name} ({what})"] == (page.parents[1] / "nodes" / name / "config.yaml").read_text()
    assert "title: A study of seconds" in page.read_text()
    store = page.parents[2] / "data" / "store"
    (validated,) = [ids for name, ids in view.volumes if name.startswith(f"{row['validated on']}, ")]
    assert validated == ["aaaa", "bbbb", "cccc"]
    assert view.volumes[0][0].endswith(f" volume(s) of {store}")
    assert any("loss is not finite" in note for note in view.notes)


def test_the_tables_are_also_a_text_file_with_the_same_numbers_seeds_and_commit(study):
    text = (study[2].parent / "results.md").read_text()
    assert text.startswith("# A study of seconds\n")
    assert "\n## Main\n\nDoes pretraining help?\n" in text
    assert "\n| mae |  | 4 of 4 | 0.755 +/- 0.006 |" in text
    ratios = "1.00 [1.00, 1.00] | 0.50 [0.50, 0.50]"
    assert f"\n| mae | scratch | +0.250 | [+0.250, +0.250] | 2 x 2, 2 cases | {ratios} |" in text
    assert "times as fast in steps, not shown to differ, and 0.50 [0.50, 0.50]" in text
    commits = "aaaaaaaaaaaa, bbbbbbbbbbbb-dirty, cccccccccccc"
    run = r"\| 1 \| 0 \| 0\.750 \| step_00000040 \| pretrain-\w+ \| finetune-\w+ \| evaluate \|"
    assert re.search(rf"\n\| Main \| mae {run} {commits} \| ", text)
    assert "volume(s) of" in text
    # What names and reasons hold is text here as well.
    assert "| &lt;b>broken&lt;/b> |" in text
    assert "loss is not finite &lt;script>" in text
    columns = {
        len(re.findall(r"(?<!\\)\|", line))
        for line in text.split("## Cost")[1].split("##")[0].splitlines()
        if "|" in line
    }
    assert len(columns) == 1


def test_every_node_says_what_it_comes_after(study):
    nodes, text = study[1].nodes, (study[2].parent / "results.md").read_text()
    after = {row[1]: row[2] for row in nodes.rows}
    assert nodes.columns[:3] == ["node", "what", "after"]
    assert after["pretrain mae, seed 1"] == ""  # its store was there already
    assert after["finetune mae, seeds 1, 0"] == "pretrain mae, seed 1"
    assert after["evaluate mae, seeds 1, 0"] == "finetune mae, seeds 1, 0"
    failed = "| pretrain &lt;b>broken&lt;/b>, seed 0 |  | failed |"
    assert failed in text.split("## Nodes that are not done")[1]
    assert " | done | " not in text.split("## Nodes that are not done")[1]


def test_text_in_a_table_of_markdown_stays_in_its_cell():
    from mimscale.report.study_markdown import _row

    assert _row(["a|b", "two\nlines", "c\\"]) == "| a\\|b | two lines | c\\\\ |"


def test_an_experiment_of_which_nothing_is_scored_shows_no_empty_tables(study):
    view = replace(study[1], sections=[replace(study[1].sections[1], measured=False)])
    text = study_markdown(view)
    assert "Nothing is measured yet." in text
    assert "Scores of the last checkpoint" not in text


def test_the_chart_says_when_the_target_was_reached(study):
    curves = {curve.arm: curve for curve in study[1].sections[0].curves}
    assert set(curves) == {"scratch", "mae"}
    assert curves["mae"].reached == "40"  # scratch has its own final Dice at its end
