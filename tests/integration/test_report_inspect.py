import json
import time
from dataclasses import replace

import numpy as np
import pytest
from fault_injector import flip_bit
from matplotlib.image import imread
from small_segmentation import SOURCES, make_finetune_run, make_store

from mimscale.cli import main
from mimscale.report.inspect import age_text
from mimscale.store import layout
from mimscale.store.manifest import load_manifest, write_manifest


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data"), labelled=("aaaa", "bbbb"))


def write_receipts(store):
    lines = [{"id": name, "outcome": "stored", "row": {}} for name in SOURCES]
    lines.append({"id": "dddd", "outcome": "quarantined", "reason": "truncated", "detail": "ends early"})
    path = layout.receipt_path(store, 0)
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_store_tells_its_volumes_grids_sizes_and_what_became_of_its_sources(store, capsys):
    write_receipts(store)
    assert main(["inspect", str(store), "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["volumes"] == 3
    assert tree["splits"] == {"val": 3}
    assert tree["labelled"] == {"label": 2}
    assert tree["sources"] == {"stored": 3, "quarantined": 1}
    assert tree["reasons"] == {"truncated": 1}
    assert tree["spacings_mm"].keys() == {"2 x 1.5 x 1", "3 x 1 x 0.5", "2 x 1 x 1"}
    assert sum(tree["shapes"].values()) == 3
    assert "png" not in tree
    voxels = sum(int(np.prod(shape)) for _, shape, _ in SOURCES.values())
    assert tree["raw_bytes"] == 2 * voxels
    assert tree["compression"] == pytest.approx(tree["raw_bytes"] / tree["stored_bytes"], abs=1e-3)
    assert tree["disk_bytes"] > tree["stored_bytes"]


def test_the_same_is_told_to_a_person_on_stderr(store, capsys):
    assert main(["inspect", str(store)]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "compression" in err
    assert "bbbb" in err


def test_a_whole_store_verifies(store, capsys):
    assert main(["inspect", str(store), "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"ok": True, "bad": []}


def test_a_flipped_byte_is_found_named_and_exits_with_3(tmp_path, capsys):
    store = make_store(tmp_path / "data")
    manifest = load_manifest(store)
    row = manifest.row(manifest.index_of("bbbb"))
    flip_bit(layout.pack_path(store, 0), row.offset_bytes + 50)
    assert main(["inspect", str(store), "--verify", "--json"]) == 3
    tree = json.loads(capsys.readouterr().out)
    assert tree["ok"] is False
    assert {item["volume"] for item in tree["bad"]} == {"bbbb"}
    assert tree["bad"][0].keys() == {"volume", "path", "reason"}


@pytest.mark.parametrize(("volume", "rows"), [("aaaa", 2), ("cccc", 1)])
def test_a_volume_is_drawn_with_its_labels_below_when_it_has_some(volume, rows, store, tmp_path, capsys):
    path = tmp_path / "picture.png"
    assert main(["inspect", str(store), volume, "--png", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["png"] == str(path)
    picture = imread(path)[..., :3]
    assert picture.std() > 0.1
    coloured = (np.ptp(picture, axis=2) > 0.2).any()
    assert coloured == (rows == 2)


@pytest.mark.parametrize(("count", "panels"), [(2, 2), (24, 3)])
def test_a_contact_sheet_has_middle_slices_with_labels_over_them(count, panels, store, tmp_path, capsys):
    path = tmp_path / "sheet.png"
    assert main(["inspect", str(store), "--png", str(path), "--volumes", str(count), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["png"] == str(path)
    assert f"middle slices of {panels} volumes, which may show faces" in err
    picture = imread(path)[..., :3]
    width = picture.shape[1] // panels
    coloured = [
        bool((np.ptp(picture[:, place * width : (place + 1) * width], axis=2) > 0.2).any()) for place in range(panels)
    ]
    # aaaa and bbbb have labels, cccc has none; of two volumes the first and the last are drawn.
    assert coloured == ([True, False] if count == 2 else [True, True, False])


def test_a_label_on_the_grid_of_the_source_is_not_laid_over_other_voxels(tmp_path):
    store = make_store(tmp_path / "data", labelled=("aaaa",))
    rows = [load_manifest(store).row(index) for index in range(3)]
    for row in rows:
        row.overlays.update({name: replace(place, source_zyx=row.source_zyx) for name, place in row.overlays.items()})
    write_manifest(store, rows)
    for words in (["--png", str(tmp_path / "sheet.png")], ["aaaa", "--png", str(tmp_path / "sheet.png")]):
        assert main(["inspect", str(store), *words]) == 0
        assert np.ptp(imread(tmp_path / "sheet.png")[..., :3], axis=2).max() < 0.2


def test_a_contact_sheet_of_a_damaged_store_says_which_volume_it_could_not_read(tmp_path):
    store = make_store(tmp_path / "data")
    layout.pack_path(store, 0).write_bytes(b"")
    assert main(["inspect", str(store), "--png", str(tmp_path / "sheet.png")]) == 0
    assert imread(tmp_path / "sheet.png").std() > 0.01


def test_a_picture_is_named_after_its_volume_by_default(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", str(store), "bbbb", "--png"]) == 0
    assert (tmp_path / "bbbb.png").exists()


def test_a_volume_is_described_without_a_picture(store, capsys):
    assert main(["inspect", str(store), "bbbb", "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["source_orientation"] == "LPI"
    assert "png" not in tree


def test_a_run_tells_how_it_ended_and_which_checkpoints_are_whole(tmp_path, store, capsys):
    run = make_finetune_run(tmp_path / "run", store)
    (run / "outcome.json").write_text(
        json.dumps({"outcome": "interrupted", "exit_code": 75, "step": 5, "message": "saved"})
    )
    broken = run / "checkpoints" / "step_00000007"
    broken.mkdir()
    assert main(["inspect", str(run), "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["outcome"]["outcome"] == "interrupted"
    assert [(tag["step"], tag["usable"]) for tag in tree["checkpoints"]] == [(7, False), (5, True)]
    assert [tag["kept_as"] for tag in tree["checkpoints"]] == [[], ["newest"]]
    assert "manifest.json" in tree["checkpoints"][0]["reason"]
    assert tree["checkpoints"][1]["bytes"] > 0
    assert abs(tree["checkpoints"][1]["saved_unix_s"] - time.time()) < 600
    assert main(["inspect", str(run)]) == 0
    told = capsys.readouterr().err
    assert "NOT USABLE" in told
    assert "only sizes were compared" in told
    assert main(["inspect", str(run), "--verify", "--json"]) == 3
    tree = json.loads(capsys.readouterr().out)
    assert [item["path"][-13:] for item in tree["bad"]] == ["step_00000007"]
    assert [tag["verified"] for tag in tree["checkpoints"]] == [False, True]


def test_a_flipped_bit_in_a_checkpoint_is_found_by_verify_and_only_by_it(tmp_path, store, capsys):
    run = make_finetune_run(tmp_path / "run", store)
    flip_bit(run / "checkpoints" / "step_00000005" / "weights.safetensors")
    assert main(["inspect", str(run), "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert (tree["checked"], tree["checkpoints"][0]["usable"], tree["checkpoints"][0]["verified"]) == (
        "sizes",
        True,
        False,
    )
    assert main(["inspect", str(run), "--verify"]) == 3
    assert "weights.safetensors has other bytes than were saved" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"), [(-5, "0 s"), (119, "119 s"), (120, "2 min"), (47 * 3600, "47 h"), (3 * 86_400, "3 d")]
)
def test_an_age_is_told_in_the_largest_unit_that_it_fills_twice(seconds, text):
    assert age_text(seconds) == text


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["{tmp}"], 3, "neither a store (no store.json) nor a run directory (no config.yaml)"),
        (["{store}", "zzzz"], 3, "volume 'zzzz': not among the 3 volumes"),
        (["{run}", "--png", "x.png"], 2, "--png draws a store or one of its volumes"),
        (["{store}", "--verify", "--workers", "0"], 2, "argument --workers: invalid"),
        ([], 2, "expected STORE_OR_RUN_DIR [VOLUME]"),
    ],
)
def test_what_cannot_be_inspected_is_said(words, code, text, store, tmp_path, capsys):
    places = {"store": store, "tmp": tmp_path, "run": tmp_path / "run"}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("kind: pretrain\n")
    try:
        returned = main(["inspect", *(word.format(**places) for word in words)])
    except SystemExit as leaving:  # argparse
        returned = leaving.code
    assert returned == code
    assert text in capsys.readouterr().err
