"""Whole ingests: real files in, a store out."""

import json
import os
import re
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
from conftest import skip_unless
from processes import write_lock
from store_samples import config_of, make_store, opened, phantom, rows_of, write_key, write_nifti, write_pairs

from mimscale.cli import main
from mimscale.errors import ConfigError, DataError, LaunchError
from mimscale.ingest.geometry import to_source_grid
from mimscale.ingest.run import ingest
from mimscale.store.manifest import load_manifest
from mimscale.store.verify import verify

COLIN27 = Path("/usr/share/mricron/templates")


def data_bytes(store):
    """Packs, overlays and receipts: what must be the same for every run."""
    files = [path for folder in ("packs", "overlays", "receipts") for path in sorted((store / folder).rglob("*"))]
    return {str(path.relative_to(store)): path.read_bytes() for path in files if path.is_file()}


def journal_of(store):
    lines = [json.loads(line) for line in store.with_name(f"{store.name}.sources.jsonl").read_text().splitlines()]
    return {Path(line["source"]).name: line for line in lines}


def test_every_volume_and_label_goes_back_to_its_source(tmp_path):
    store = make_store(tmp_path, count=4)
    _, reader = opened(store)
    names = {line["id"]: name for name, line in journal_of(store).items()}
    for row in rows_of(store):
        name = names[row.id]
        image = nibabel.load(tmp_path / "sources" / "images" / name)
        label = nibabel.load(tmp_path / "sources" / "labels" / name)
        assert np.array_equal(to_source_grid(reader.read_volume(row)[0], row), np.asarray(image.dataobj))
        assert np.array_equal(to_source_grid(reader.read_volume(row, "label")[0], row), np.asarray(label.dataobj))
        assert np.array_equal(np.reshape(row.source_affine, (4, 4)), image.affine)
        counts = np.bincount(np.asarray(label.dataobj).reshape(-1), minlength=3)
        assert row.overlays["label"].class_voxels == tuple(counts)
    assert verify(store) == []


def test_workers_and_a_second_run_change_no_byte(tmp_path):
    sources = write_pairs(tmp_path / "sources", 6)
    key = write_key(tmp_path / "key")
    for name, workers in (("one", 1), ("two", 2), ("three", 3)):
        ingest(config_of(sources, tmp_path / name, workers=workers, parts=3, subject_key=key))
    one = data_bytes(tmp_path / "one")
    assert len(one) >= 8  # three packs, three receipts, the duplicates, and an overlay for each part with labels
    assert data_bytes(tmp_path / "two") == one
    assert data_bytes(tmp_path / "three") == one
    ingest(config_of(sources, tmp_path / "one", workers=2, parts=3, subject_key=key))
    assert data_bytes(tmp_path / "one") == one


def test_parts_that_are_finished_are_not_done_again(tmp_path):
    store = make_store(tmp_path, count=4)
    before = data_bytes(store)
    kept, redone = store / "packs" / "part-00000.zarr.zip", store / "packs" / "part-00001.zarr.zip"
    inode = kept.stat().st_ino
    (store / "receipts" / "part-00001.jsonl").unlink()
    redone.unlink()
    (store / "manifest.parquet").unlink()
    sources = {kind: str(tmp_path / "sources" / kind / "*.nii.gz") for kind in ("images", "labels")}
    ingest(config_of(sources, store, parts=2, chunk_voxels=16))
    assert data_bytes(store) == before
    assert kept.stat().st_ino == inode
    assert len(load_manifest(store)) == 4


def bad_sources(folder):
    """One good source and one of each kind of bad ones; returns `sources` and the reasons by file name."""
    good = write_nifti(folder / "good.nii.gz", phantom(0))
    nan = np.zeros((6, 6, 6), np.float32)
    nan[0, 0, 0] = np.nan
    write_nifti(folder / "nan.nii.gz", nan)
    (folder / "empty.nii.gz").write_bytes(b"")
    (folder / "cut.nii.gz").write_bytes(good.read_bytes()[:-100])
    (folder / "text.nii.gz").write_bytes(b"this is no image")
    write_nifti(folder / "time.nii.gz", np.zeros((4, 4, 4, 9), np.int16))
    sources = [str(folder / "*.nii.gz"), {"image": str(folder / "gone.nii.gz")}]
    labelled = phantom(1)
    for name, label, affine in (
        ("shape", np.zeros((40, 37, 20), np.uint8), None),
        ("moved", np.zeros((40, 37, 21), np.uint8), np.diag([1.0, 1.5, 2.1, 1.0])),
        ("values", np.full((40, 37, 21), 7, np.uint8), None),
        ("fraction", np.full((40, 37, 21), 0.5, np.float32), None),
    ):
        labelled = labelled + 1
        image = write_nifti(folder / "labelled" / f"{name}.nii.gz", labelled)
        sources.append({"image": str(image), "label": str(write_nifti(folder / "l" / f"{name}.nii.gz", label, affine))})
    return sources, {
        "good.nii.gz": None,
        "nan.nii.gz": "not_finite",
        "empty.nii.gz": "empty_file",
        "cut.nii.gz": "truncated",
        "text.nii.gz": "unreadable",
        "time.nii.gz": "not_3d",
        "gone.nii.gz": "missing_file",
        "shape.nii.gz": "label_grid_mismatch",
        "moved.nii.gz": "label_grid_mismatch",
        "values.nii.gz": "unexpected_labels",
        "fraction.nii.gz": "unexpected_labels",
    }


def test_bad_sources_are_quarantined_with_a_reason_and_stop_nothing(tmp_path):
    sources, reasons = bad_sources(tmp_path / "s")
    summary = ingest(config_of(sources, tmp_path / "store", workers=2, parts=3))
    assert {name: line.get("reason") for name, line in journal_of(tmp_path / "store").items()} == reasons
    assert (summary["stored"], summary["quarantined"]) == (1, 10)
    assert summary["reasons"]["label_grid_mismatch"] == 2
    assert len(load_manifest(tmp_path / "store")) == 1
    inside = b"".join(data_bytes(tmp_path / "store").values())
    assert b"nii.gz" not in inside  # file names may name patients, and lie beside the store
    assert os.stat(tmp_path / "store.sources.jsonl").st_mode & 0o777 == 0o600


def recipe(tmp_path, **options):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"workers": 1, "modality": "mr", **options}))
    return str(path)


def test_too_many_quarantined_exits_3_without_a_manifest_and_a_higher_limit_keeps_the_work(tmp_path, capsys):
    sources, _ = bad_sources(tmp_path / "s")
    words = ["ingest", recipe(tmp_path, sources=sources, class_names=["a", "b"]), f"out={tmp_path}/store"]
    assert main([*words, "max_quarantined=9"]) == 3
    assert "10 quarantined, max_quarantined=9" in capsys.readouterr().err
    assert not (tmp_path / "store" / "manifest.parquet").exists()
    assert main([*words, "max_quarantined=10", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["stored"] == 1
    assert "1 of 1 parts are finished already" in printed.err


def test_quarantined_sources_are_named_with_what_is_wrong_and_the_way_out(tmp_path, capsys):
    sources, reasons = bad_sources(tmp_path / "s")
    assert main(["ingest", recipe(tmp_path, sources=sources, class_names=["a", "b"]), f"out={tmp_path}/store"]) == 0
    shown = capsys.readouterr().err
    for name, reason in reasons.items():
        assert (reason is None) or re.search(rf"/{re.escape(name)}( with label .*)?: .* \({reason}: .+\)", shown), name
    assert f"{tmp_path}/s/labelled/moved.nii.gz with label {tmp_path}/s/l/moved.nii.gz: " in shown
    assert "(not_finite: 1 of 216 voxels are NaN or infinite)" in shown
    assert "put these right and run the same command again" in shown


def test_nothing_stored_exits_3_and_says_where_the_reasons_are(tmp_path, capsys):
    (tmp_path / "a.nii").write_bytes(b"")
    assert main(["ingest", recipe(tmp_path), f"sources={tmp_path}/a.nii", f"out={tmp_path}/store", "--json"]) == 3
    printed = capsys.readouterr()
    assert json.loads(printed.out)["reasons"] == {"empty_file": 1}
    assert f"{tmp_path}/a.nii: 0 bytes (empty_file: 0 bytes)" in printed.err
    assert "not one source could be stored" in printed.err
    assert "store.sources.jsonl" in printed.err


def test_sources_that_match_nothing_exit_3_and_leave_no_store(tmp_path, capsys):
    assert main(["ingest", recipe(tmp_path), f"sources={tmp_path}/*.nii", f"out={tmp_path}/store"]) == 3
    assert f"sources={tmp_path}/*.nii: matches no file" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_a_typo_in_the_recipe_exits_2_and_names_the_key(tmp_path, capsys):
    words = [
        "ingest",
        recipe(tmp_path),
        "sources=x",
        f"out={tmp_path}/store",
        "chunk_voxel=16",
        "intensity.kind=window",
    ]
    assert main(words) == 2
    printed = capsys.readouterr().err
    assert "chunk_voxel: " in printed
    assert main(words[:-2] + words[-1:]) == 2
    assert "kind=window needs [low, high]" in capsys.readouterr().err


def test_check_prints_the_config_and_leaves(tmp_path, capsys):
    assert main(["ingest", "demo/ingest", "sources=x", f"out={tmp_path}/store", "--check"]) == 0
    assert "modality: mr" in capsys.readouterr().out
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", ["demo/ingest", "ingest_ct", "ingest_mr"])
def test_every_packaged_recipe_is_a_config(name, tmp_path, capsys):
    assert main(["ingest", name, "--check", "sources=x", f"out={tmp_path}/store"]) == 0


def test_another_config_on_the_same_store_names_the_keys(tmp_path):
    store = make_store(tmp_path)
    sources = {kind: str(tmp_path / "sources" / kind / "*.nii.gz") for kind in ("images", "labels")}
    with pytest.raises(
        ConfigError, match=r"(?s)made with another config.*chunk_voxels: 16 -> 32.*codec: 'zstd' -> 'fast'"
    ):
        ingest(config_of(sources, store, parts=2, codec="fast"))


def test_a_lost_or_other_subject_key_is_refused(tmp_path):
    store = make_store(tmp_path)
    sources = {kind: str(tmp_path / "sources" / kind / "*.nii.gz") for kind in ("images", "labels")}
    (tmp_path / "store.subject_key").unlink()
    with pytest.raises(ConfigError, match=r"store\.subject_key: the subject key [0-9a-f]{16} of .* is gone"):
        ingest(config_of(sources, store, parts=2, chunk_voxels=16))
    (tmp_path / "other").write_text("ab" * 32)
    (tmp_path / "other").chmod(0o600)
    with pytest.raises(ConfigError, match="give the right one with subject_key=FILE"):
        ingest(config_of(sources, store, parts=2, chunk_voxels=16, subject_key=str(tmp_path / "other")))


def test_an_out_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match=r"not a store, and not empty \(it holds thesis\.tex\)"):
        ingest(config_of(write_pairs(tmp_path / "s", 1), tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_a_second_ingest_at_once_is_refused(tmp_path):
    store = make_store(tmp_path)
    write_lock(store / "ingest.lock", "another ingest", pid=1, host="elsewhere", since_unix_s=time.time())
    sources = {kind: str(tmp_path / "sources" / kind / "*.nii.gz") for kind in ("images", "labels")}
    with pytest.raises(LaunchError, match=r"another ingest .*elsewhere\) is writing here.*remove .*ingest\.lock"):
        ingest(config_of(sources, store, parts=2, chunk_voxels=16))


def test_a_tables_subjects_and_columns_that_identify_reach_neither_store_nor_log(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MIMSCALE_JOB_ID", "4711")  # a job's log stays; a person's terminal may name files
    for name in ("rosa", "bo"):
        write_nifti(tmp_path / "s" / f"{name}_amsel.nii", phantom(len(name)))
    table = tmp_path / "s" / "scans.csv"
    table.write_text(
        "image,subject,PatientName,BirthDate,site\n"
        "rosa_amsel.nii,Rosa_Amsel,Rosa^Amsel,19500203,a\n"
        "bo_amsel.nii,Bo_Amsel,Bo^Amsel,19520506,b\n"
        "gone_amsel.nii,Gone_Amsel,Gone^Amsel,19540708,b\n"
    )
    words = ["ingest", recipe(tmp_path), f"sources={table}", f"out={tmp_path}/store", "--json"]
    assert main(words) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["reasons"] == {"missing_file": 1}
    inside = b"".join(path.read_bytes() for path in sorted((tmp_path / "store").rglob("*")) if path.is_file())
    for planted in ("amsel", "1950", "1952", "1954"):
        assert planted.encode() not in inside.lower()
        assert planted not in (printed.out + printed.err).lower()
        assert planted not in str(rows_of(tmp_path / "store")).lower()  # Parquet compresses


def test_labels_without_class_names_are_refused_before_anything_is_done(tmp_path):
    with pytest.raises(ConfigError, match=r"class_names: there are label files"):
        ingest(config_of(write_pairs(tmp_path / "s", 1), tmp_path / "store", class_names=[]))
    assert not (tmp_path / "store").exists()


def test_the_same_scan_is_stored_once(tmp_path):
    voxels = phantom(0)
    write_nifti(tmp_path / "s" / "a.nii", voxels)
    write_nifti(tmp_path / "s" / "b.nii.gz", voxels)
    write_nifti(tmp_path / "s" / "c.nii", voxels[::-1], np.diag([-1.0, 1.5, 2.0, 1.0]) + np.eye(4, k=3) * 39.0)
    write_nifti(tmp_path / "s" / "d.nii", voxels + 1)
    (tmp_path / "s" / "e.nii").write_bytes((tmp_path / "s" / "a.nii").read_bytes())
    summary = ingest(config_of(str(tmp_path / "s"), tmp_path / "store", parts=2))
    assert (summary["stored"], summary["duplicates"]) == (2, 3)
    kept = {row.id for row in rows_of(tmp_path / "store")}
    assert {line["of"] for line in journal_of(tmp_path / "store").values() if line["outcome"] == "duplicate"} <= kept


@pytest.mark.parametrize("copy_of_image", ["same bytes", "same voxels"])
def test_of_equal_images_the_labelled_one_is_kept_and_another_label_is_no_mere_duplicate(tmp_path, copy_of_image):
    voxels = phantom(0)
    image = write_nifti(tmp_path / "s" / "a.nii", voxels)
    other = write_nifti(tmp_path / "s" / ("b.nii" if copy_of_image == "same bytes" else "b.nii.gz"), voxels)
    first = write_nifti(tmp_path / "s" / "label_1.nii", (voxels > 200).astype(np.uint8))
    second = write_nifti(tmp_path / "s" / "label_2.nii", (voxels > 350).astype(np.uint8))
    plain, labelled = str(image), {"image": str(other), "label": str(first)}
    summary = ingest(config_of([plain, labelled], tmp_path / "one"))
    assert (summary["stored"], summary["duplicates"], summary["quarantined"]) == (1, 1, 0)
    (row,) = rows_of(tmp_path / "one")
    assert row.overlays["label"].class_voxels[1] == (voxels > 200).sum()

    rival = {"image": str(image), "label": str(second)}
    stores = [tmp_path / "two", tmp_path / "three"]
    for store, sources in zip(stores, ([plain, labelled, rival], [rival, labelled, plain]), strict=True):
        summary = ingest(config_of(sources, store))
        assert summary["stored"] == 1
        assert summary["reasons"] == {"conflicting_labels": 1}
    assert rows_of(stores[0])[0].overlays == rows_of(stores[1])[0].overlays


def test_subjects_are_hidden_and_never_in_both_splits(tmp_path):
    for subject in ("sub-anna", "sub-bert", "sub-carl", "sub-dora"):
        for session in (1, 2):
            voxels = phantom(hash((subject, session)) % 1000 + session)
            write_nifti(tmp_path / "s" / f"{subject}_ses-{session}.nii.gz", voxels)
    ingest(config_of(str(tmp_path / "s"), tmp_path / "store", val_fraction=0.5))
    rows = rows_of(tmp_path / "store")
    of_split = {split: {row.subject for row in rows if row.split == split} for split in ("train", "val")}
    assert len(of_split["train"]) == len(of_split["val"]) == 2
    assert not of_split["train"] & of_split["val"]
    everything = b"".join(path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file())
    assert b"anna" not in everything


def test_volumes_without_labels_stand_beside_labelled_ones(tmp_path):
    sources = write_pairs(tmp_path / "s", 2)
    (tmp_path / "s" / "labels" / "case_00.nii.gz").unlink()
    ingest(config_of(sources, tmp_path / "store"))
    assert sorted(len(row.overlays) for row in rows_of(tmp_path / "store")) == [0, 1]
    assert verify(tmp_path / "store") == []


def test_a_label_that_is_flipped_against_its_image_is_turned_with_it(tmp_path):
    voxels = phantom(0)
    label = np.digitize(voxels, [200, 350]).astype(np.uint8)
    flipped = np.diag([-1.0, 1.5, 2.0, 1.0])
    flipped[0, 3] = 39
    pair = {
        "image": str(write_nifti(tmp_path / "i.nii", voxels)),
        "label": str(write_nifti(tmp_path / "l.nii", label[::-1], flipped)),
    }
    ingest(config_of([pair], tmp_path / "store"))
    manifest, reader = opened(tmp_path / "store")
    assert np.array_equal(reader.read_volume(manifest.row(0), "label")[0], label.transpose(2, 1, 0))


def test_colin27_and_its_116_regions_come_back_bit_for_bit(tmp_path):
    image, label = COLIN27 / "ch2.nii.gz", COLIN27 / "aal.nii.gz"
    skip_unless(image.exists(), f"{image}: needs Debian's mricron-data (apt-get install mricron-data)")
    names = ["background", *(f"aal_{number}" for number in range(1, 117))]
    pair = {"image": str(image), "label": str(label)}
    summary = ingest(config_of([pair], tmp_path / "store", class_names=names))
    assert summary["stored"] == 1
    manifest, reader = opened(tmp_path / "store")
    row = manifest.row(0)
    assert (row.dtype, row.spacing_mm, row.source_shape) == ("uint8", (1.0, 1.0, 1.0), (181, 217, 181))
    voxels, regions = (np.asarray(nibabel.load(path).dataobj) for path in (image, label))
    assert np.array_equal(to_source_grid(reader.read_volume(row)[0], row), voxels)
    assert np.array_equal(to_source_grid(reader.read_volume(row, "label")[0], row), regions)
    assert row.overlays["label"].class_voxels == tuple(np.bincount(regions.reshape(-1), minlength=117))
    assert 60 < row.stats[0].foreground_mean < 140
    assert verify(tmp_path / "store") == []


def test_a_missing_store_is_an_error_of_verify(tmp_path):
    with pytest.raises(DataError, match="give the folder"):
        verify(tmp_path)


def test_channels_of_one_subject_become_one_volume_and_their_order_counts(tmp_path):
    voxels = [phantom(number) for number in range(3)]
    files = [str(write_nifti(tmp_path / f"{number}.nii", one)) for number, one in enumerate(voxels)]
    ingest(config_of([{"image": files}, {"image": files[::-1]}], tmp_path / "store"))
    manifest, reader = opened(tmp_path / "store")
    assert len(manifest) == 2
    for index in range(2):
        row = manifest.row(index)
        stored = [to_source_grid(channel, row) for channel in reader.read_volume(row)]
        assert any(np.array_equal(stored, order) for order in (voxels, voxels[::-1]))


def test_channels_on_other_grids_and_a_channel_that_is_gone_are_named(tmp_path):
    one = str(write_nifti(tmp_path / "one.nii", phantom(0)))
    moved = str(write_nifti(tmp_path / "moved.nii", phantom(1), np.diag([1.0, 1.5, 2.2, 1.0])))
    small = str(write_nifti(tmp_path / "small.nii", phantom(1, (20, 20, 20))))
    sources = [{"image": [one, other]} for other in (moved, small, str(tmp_path / "gone.nii"))]
    summary = ingest(config_of(sources, tmp_path / "store"))
    assert summary["reasons"] == {"channel_grid_mismatch": 2, "missing_file": 1}


def test_channels_of_different_types_are_stored_in_one_that_holds_all(tmp_path):
    whole = phantom(0)
    fine = np.random.RandomState(0).rand(*whole.shape).astype(np.float32)
    pair = [str(write_nifti(tmp_path / "whole.nii", whole)), str(write_nifti(tmp_path / "fine.nii", fine))]
    ingest(config_of([{"image": pair}], tmp_path / "store"))
    manifest, reader = opened(tmp_path / "store")
    row = manifest.row(0)
    assert row.dtype == "float32"
    stored = reader.read_volume(row)
    assert np.array_equal(to_source_grid(stored[0], row), whole)
    assert np.array_equal(to_source_grid(stored[1], row), fine)
