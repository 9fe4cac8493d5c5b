"""A store that grows and shrinks: array tasks, sources and label maps that come later, a subject that leaves."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
from store_samples import config_of, opened, phantom, rows_of, write_key, write_nifti, write_pairs

from mimscale import durable
from mimscale.cli import main
from mimscale.errors import ConfigError, DataError, LaunchError
from mimscale.ingest.geometry import to_source_grid
from mimscale.ingest.run import ingest
from mimscale.store import layout
from mimscale.store.manifest import load_manifest
from mimscale.store.verify import verify

RUN = "import sys; from mimscale.cli import main; sys.exit(main(sys.argv[1:]))"


def contents(store):
    """Every file of a store."""
    return {str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}


def pack_bytes(store):
    return {name: data for name, data in contents(store).items() if name.startswith(("packs", "overlays"))}


def journal_of(store):
    lines = [json.loads(line) for line in store.with_name(f"{store.name}.sources.jsonl").read_text().splitlines()]
    return {Path(line["source"]).name: line for line in lines}


def test_any_number_of_array_tasks_gives_the_store_of_one_local_run(tmp_path):
    sources, key = write_pairs(tmp_path / "s", 7), write_key(tmp_path / "key")

    def config(store, **options):
        return config_of(sources, tmp_path / store, parts=5, subject_key=key, **options)

    ingest(config("local"))
    for tasks in (1, 3, 8):
        name = f"array_{tasks}"
        for task in reversed(range(tasks)):  # in whatever order Slurm starts them
            ingest(config(name, task=f"{task}/{tasks}"))
            assert not layout.manifest_path(tmp_path / name).exists()
        summary = ingest(config(name, merge=True))
        assert summary["stored"] == 7
        assert contents(tmp_path / name) == contents(tmp_path / "local")
    ingest(config("array_3", task="1/3"))  # one that Slurm starts again after the end has nothing to do
    assert contents(tmp_path / "array_3") == contents(tmp_path / "local")


def test_a_merge_before_the_last_task_names_the_parts_that_are_missing(tmp_path, capsys):
    sources = write_pairs(tmp_path / "s", 6)
    ingest(config_of(sources, tmp_path / "store", parts=4, task="0/2"))
    with pytest.raises(DataError, match=r"2 of 4 parts have no receipt \(1, 3\).*run these tasks again"):
        ingest(config_of(sources, tmp_path / "store", parts=4, merge=True))
    assert not layout.manifest_path(tmp_path / "store").exists()


def test_tasks_that_start_at_once_share_one_plan(tmp_path):
    sources = write_pairs(tmp_path / "s", 8)
    options = {"sources": sources, "class_names": ["a", "b", "c"], "workers": 1, "parts": 4}
    (tmp_path / "r.yaml").write_text(json.dumps(options))
    words = [sys.executable, "-c", RUN, "ingest", str(tmp_path / "r.yaml"), f"out={tmp_path}/store"]
    tasks = [subprocess.Popen([*words, f"task={task}/4"], stderr=subprocess.PIPE, text=True) for task in range(4)]
    for task in tasks:
        _, error = task.communicate(timeout=120)
        assert task.returncode == 0, error
    assert main([*words[3:], "merge=true"]) == 0
    assert len(load_manifest(tmp_path / "store")) == 8


def test_a_local_ingest_and_a_task_do_not_work_at_once(tmp_path):
    from processes import write_lock

    sources = write_pairs(tmp_path / "s", 2)
    ingest(config_of(sources, tmp_path / "store", task="0/1"))
    write_lock(
        tmp_path / "store" / "task-00000-of-00001.lock",
        "ingest task 0/1",
        pid=1,
        host="elsewhere",
        since_unix_s=time.time(),
    )
    with pytest.raises(LaunchError, match=r"ingest task 0/1 .*elsewhere"):
        ingest(config_of(sources, tmp_path / "store"))


@pytest.mark.parametrize("task", ["3/3", "a/b", "1", "-1/2"])
def test_a_task_that_is_none_is_named(task, tmp_path):
    with pytest.raises(ConfigError, match=f"task={task}: expected I/N"):
        config_of("x", tmp_path, task=task)


def test_sources_that_come_later_become_new_parts_and_change_no_pack(tmp_path):
    sources, key = write_pairs(tmp_path / "s", 3), write_key(tmp_path / "key")
    store = tmp_path / "store"
    ingest(config_of(sources, store, parts=2, subject_key=key))
    before, rows = pack_bytes(store), {row.id: row for row in rows_of(store)}
    write_pairs(tmp_path / "s", 6)
    summary = ingest(config_of(sources, store, parts=2, subject_key=key, dataset="later"))
    assert summary["stored"] == 6
    after = pack_bytes(store)
    assert {name: after[name] for name in before} == before
    assert {name.partition("part-")[2][:5] for name in after.keys() - before.keys()} <= {"00002", "00003"}
    grown = {row.id: row for row in rows_of(store)}
    assert {row_id: grown[row_id] for row_id in rows} == rows  # split included: nobody moves from train to val
    assert {row.dataset for row_id, row in grown.items() if row_id not in rows} == {"later"}
    assert verify(store) == []
    assert ingest(config_of(sources, store, parts=2, subject_key=key, dataset="later"))["stored"] == 6
    assert pack_bytes(store) == after


def test_what_all_volumes_share_cannot_differ_later(tmp_path):
    sources = write_pairs(tmp_path / "s", 2)
    ingest(config_of(sources, tmp_path / "store"))
    write_pairs(tmp_path / "s", 3)
    with pytest.raises(ConfigError, match=r"(?s)another config.*codec: 'zstd' -> 'fast'"):
        ingest(config_of(sources, tmp_path / "store", codec="fast"))


def test_a_file_that_was_repaired_is_read_again_and_only_what_it_is_now_counts(tmp_path):
    write_nifti(tmp_path / "s" / "good.nii.gz", phantom(1))
    whole = write_nifti(tmp_path / "s" / "cut.nii.gz", phantom(2)).read_bytes()
    (tmp_path / "s" / "cut.nii.gz").write_bytes(whole[:-50])
    sources, store = str(tmp_path / "s"), tmp_path / "store"
    assert ingest(config_of(sources, store))["reasons"] == {"truncated": 1}
    (tmp_path / "s" / "cut.nii.gz").write_bytes(whole)
    summary = ingest(config_of(sources, store))
    assert (summary["stored"], summary["quarantined"], summary["superseded"]) == (2, 0, 1)
    assert journal_of(store)["cut.nii.gz"]["outcome"] == "stored"

    write_nifti(tmp_path / "s" / "good.nii.gz", phantom(3))  # another scan under the same name
    assert ingest(config_of(sources, store))["stored"] == 2
    manifest, reader = opened(store)
    row = manifest.row(manifest.index_of(journal_of(store)["good.nii.gz"]["id"]))
    assert np.array_equal(to_source_grid(reader.read_volume(row)[0], row), phantom(3))


def test_label_maps_come_later_and_can_be_replaced_without_touching_a_pack_or_an_id(tmp_path):
    sources, store = write_pairs(tmp_path / "s", 3), tmp_path / "store"
    images = sources["images"]
    ingest(config_of(images, store))
    packs = {name: data for name, data in pack_bytes(store).items() if name.startswith("packs")}
    ids = [row.id for row in rows_of(store)]
    summary = ingest(config_of(sources, store))
    assert (summary["stored"], summary["overlays"]) == (3, 3)
    assert all(set(row.overlays) == {"label"} for row in rows_of(store))

    for label in (tmp_path / "s" / "labels").iterdir():
        image = nibabel.load(label)
        write_nifti(label, 2 - np.asarray(image.dataobj))
    ingest(config_of(sources, store))
    manifest, reader = opened(store)
    by_id = {line["id"]: name for name, line in journal_of(store).items()}
    for index in range(3):
        row = manifest.row(index)
        wanted = np.asarray(nibabel.load(tmp_path / "s" / "labels" / by_id[row.id]).dataobj)
        assert np.array_equal(to_source_grid(reader.read_volume(row, "label")[0], row), wanted)

    masks = {"images": images, "labels": sources["labels"]}
    ingest(config_of(masks, store, overlay="exclude", class_names=["keep", "face", "outside"]))
    assert all(set(row.overlays) == {"label", "exclude"} for row in rows_of(store))
    assert layout.read_info(store).overlays["exclude"].class_names == ("keep", "face", "outside")
    assert [row.id for row in rows_of(store)] == ids
    after = pack_bytes(store)
    assert {name: data for name, data in after.items() if name.startswith("packs")} == packs
    assert verify(store) == []


def test_class_names_of_an_overlay_cannot_change_with_later_labels(tmp_path):
    sources = write_pairs(tmp_path / "s", 2)
    ingest(config_of(sources, tmp_path / "store"))
    write_pairs(tmp_path / "s", 3)
    with pytest.raises(ConfigError, match=r"overlay label of .* has \['air', 'dark', 'bright'\]"):
        ingest(config_of(sources, tmp_path / "store", class_names=["a", "b", "c"]))


def test_a_class_map_renumbers_labels_and_names_values_that_it_does_not_know(tmp_path):
    voxels = phantom(0)
    label = np.digitize(voxels, [200, 350]).astype(np.int16) * 100
    pair = {"image": str(write_nifti(tmp_path / "i.nii", voxels)), "label": str(write_nifti(tmp_path / "l.nii", label))}
    ingest(config_of([pair], tmp_path / "store", class_map={100: 2, 200: 1}))
    manifest, reader = opened(tmp_path / "store")
    stored = to_source_grid(reader.read_volume(manifest.row(0), "label")[0], manifest.row(0))
    assert np.array_equal(stored, np.select([label == 100, label == 200], [2, 1], 0))
    summary = ingest(config_of([pair], tmp_path / "other", class_map={100: 2}))
    assert summary["reasons"] == {"unexpected_labels": 1}
    assert "200; class_names has 3 names" in journal_of(tmp_path / "other")["i.nii"]["detail"]


def subjects(folder):
    """Three subjects with two labelled scans each, over a few parts."""
    pairs = []
    for number, subject in enumerate(("anna", "bert", "carl")):
        for scan in range(2):
            voxels = phantom(10 * number + scan)
            image = write_nifti(folder / "i" / f"sub-{subject}_{scan}.nii.gz", voxels)
            label = write_nifti(folder / "l" / f"sub-{subject}_{scan}.nii.gz", (voxels > 200).astype(np.uint8))
            pairs.append({"image": str(image), "label": str(label)})
    return pairs


def test_a_removed_subject_is_gone_from_every_file_and_does_not_come_back(tmp_path):
    pairs, store = subjects(tmp_path / "s"), tmp_path / "store"
    config = config_of(pairs, store, parts=2)
    ingest(config)
    names = {line["id"]: name for name, line in journal_of(store).items()}
    anna = {volume_id for volume_id, name in names.items() if "anna" in name}
    others = {row.id: row for row in rows_of(store) if row.id not in anna}
    _, reader = opened(store)
    voxels = {row_id: reader.read_volume(row) for row_id, row in others.items()}
    summary = ingest(config_of(pairs, store, parts=2, remove="sub-anna"))
    assert (summary["removed_volumes"], summary["stored"]) == (2, 4)
    assert verify(store) == []
    everything = b"".join(path.read_bytes() for path in tmp_path.glob("store*/**/*") if path.is_file())
    everything += b"".join(path.read_bytes() for path in tmp_path.glob("store*") if path.is_file())
    assert len(anna) == 2
    for trace in (b"anna", *(volume_id.encode() for volume_id in anna)):
        assert trace not in everything
    rows = {row.id: row for row in rows_of(store)}
    assert rows.keys() == others.keys()
    _, reader = opened(store)
    for row_id, row in rows.items():
        assert np.array_equal(reader.read_volume(row), voxels[row_id])
        assert (row.split, row.subject, row.sha256) == (
            others[row_id].split,
            others[row_id].subject,
            others[row_id].sha256,
        )
        assert reader.read_volume(row, "label").any()
    again = ingest(config)  # the files are still in the folder
    assert (again["stored"], again["withdrawn"]) == (4, 2)
    assert rows.keys() == {row.id for row in rows_of(store)}


def test_two_subjects_can_leave_one_after_the_other(tmp_path):
    pairs, store = subjects(tmp_path / "s"), tmp_path / "store"
    ingest(config_of(pairs, store, parts=1))
    for subject, left in (("sub-anna", 4), ("sub-bert", 2)):
        assert ingest(config_of(pairs, store, parts=1, remove=subject))["stored"] == left
        assert verify(store) == []
    assert len(list((store / "packs").iterdir())) == 1


def test_removing_nobody_is_an_error(tmp_path, capsys):
    pairs, store = subjects(tmp_path / "s"), tmp_path / "store"
    ingest(config_of(pairs, store))
    with pytest.raises(DataError, match="holds no such subject; give its name as the sources have it"):
        ingest(config_of(pairs, store, remove="sub-zoe"))


@pytest.mark.parametrize("step", range(8))
def test_a_removal_that_is_killed_at_any_write_leaves_a_store_to_read_and_is_finished_later(
    tmp_path, monkeypatch, step
):
    pairs, store = subjects(tmp_path / "s"), tmp_path / "store"
    ingest(config_of(pairs, store, parts=2))
    writes = []
    real = durable.open_atomically

    def die(path):
        if path.suffix == ".alive":  # the lock's sign of life, from another thread
            return real(path)
        writes.append(path)
        if len(writes) > step:
            raise KeyboardInterrupt
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(durable, "open_atomically", die)
        with pytest.raises(KeyboardInterrupt):
            ingest(config_of(pairs, store, parts=2, remove="sub-anna"))
    (store / "ingest.lock").unlink(missing_ok=True)
    assert verify(store) == []
    manifest, reader = opened(store)
    for index in range(len(manifest)):
        reader.read_volume(manifest.row(index))
    assert ingest(config_of(pairs, store, parts=2, remove="sub-anna"))["stored"] == 4
    assert verify(store) == []
    packs = [path.name for path in (store / "packs").iterdir()]
    assert len(packs) == len({row.part for row in rows_of(store)})


def test_a_plan_that_is_gone_is_an_error_that_says_so(tmp_path):
    sources = write_pairs(tmp_path / "s", 2)
    ingest(config_of(sources, tmp_path / "store"))
    (tmp_path / "store.plan.jsonl").unlink()
    with pytest.raises(DataError, match=r"store\.plan\.jsonl: gone; .*Put it back"):
        ingest(config_of(sources, tmp_path / "store"))


def test_a_store_that_moves_with_its_neighbours_can_be_continued(tmp_path):
    sources = write_pairs(tmp_path / "s", 2)
    ingest(config_of(sources, tmp_path / "store"))
    for path in tmp_path.glob("store*"):
        shutil.move(path, tmp_path / path.name.replace("store", "moved"))
    write_pairs(tmp_path / "s", 3)
    assert ingest(config_of(sources, tmp_path / "moved"))["stored"] == 3
