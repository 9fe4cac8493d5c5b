import json

import numpy as np
import pytest
from store_samples import config_of, write_nifti, write_pairs

from mimscale.config import build_config
from mimscale.errors import ConfigError, DataError
from mimscale.ingest import merge, sources, statistics
from mimscale.ingest.config import ImageLabel, ImageLabelGlobs, IngestConfig


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def names_of(found):
    return [sources.stem(pair.image) for pair in found.pairs]


def test_a_glob_and_a_folder_find_the_same_volumes(tmp_path):
    touch(tmp_path, "b.nii.gz", "deep/a.nii", "c.npy", "notes.txt", "._b.nii.gz")
    assert names_of(sources.find(str(tmp_path))) == ["b", "c", "a"]
    assert names_of(sources.find(f"{tmp_path}/**/[a-z]*.n*")) == ["b", "c", "a"]


def test_a_list_is_the_union_without_repeats(tmp_path):
    touch(tmp_path, "b.nii.gz", "a.nii")
    pair = ImageLabel(image=str(tmp_path / "z.nii"), label="y.nii")
    assert names_of(sources.find([f"{tmp_path}/*", f"{tmp_path}/b*", pair])) == ["a", "b", "z"]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("{}/*.nii", r"sources=.*\*\.nii: matches no file"),
        ("{}/none.nii", r"none\.nii: no such file or folder"),
        ("{}", "the folder holds no .nii.gz"),
        ("{}/none.json", r"none\.json: No such file"),
        ([], "the list is empty"),
    ],
)
def test_sources_that_match_nothing_are_named(tmp_path, wanted, message):
    with pytest.raises(DataError, match=message):
        sources.find(wanted.format(tmp_path) if isinstance(wanted, str) else wanted)


def test_images_and_labels_are_paired_by_name(tmp_path):
    touch(tmp_path, "i/a_0000.nii.gz", "i/b_0000.nii.gz", "l/a.nii.gz")
    globs = ImageLabelGlobs(images=f"{tmp_path}/i/*", labels=f"{tmp_path}/l/*")
    first, second = sources.find(globs).pairs
    assert (first.label, second.label) == (str(tmp_path / "l/a.nii.gz"), None)
    touch(tmp_path, "l/c.nii.gz")
    with pytest.raises(DataError, match=r"1 label\(s\) without an image of the same name, first .*c\.nii\.gz"):
        sources.find(globs)
    touch(tmp_path, "l/deep/a.nii.gz")
    with pytest.raises(DataError, match="have one name"):
        sources.find(ImageLabelGlobs(images=f"{tmp_path}/i/*", labels=f"{tmp_path}/l/**/*.gz"))


def decathlon(folder, **changes):
    tree = {
        "labels": {"1": "liver", "0": "background"},
        "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}],
        "test": ["./imagesTs/b.nii.gz"],
    }
    (folder / "dataset.json").write_text(json.dumps({**tree, **changes}))
    return sources.find(str(folder))


def test_a_decathlon_gives_labels_names_and_unlabelled_volumes(tmp_path):
    found = decathlon(tmp_path)
    assert found.class_names == ("background", "liver")
    assert [(sources.stem(pair.image), pair.label is None) for pair in found.pairs] == [("a", False), ("b", True)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": [{"img": 3}]}, "not a Decathlon dataset.json"),
        ({"training": [], "test": []}, "lists no volume"),
        ({"labels": {"0": "a", "2": "b"}}, r"labels \[0, 2\] must run 0, 1, 2"),
    ],
)
def test_a_broken_decathlon_is_named(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        decathlon(tmp_path, **changes)


@pytest.mark.parametrize(
    ("name", "subject"),
    [("sub-01_ses-2_T1w.nii.gz", "sub-01"), ("BRATS_001.nii.gz", "BRATS_001"), ("x/real_000.nii", "real_000")],
)
def test_the_subject_is_in_the_file_name(name, subject):
    assert sources.subject_of(name, IngestConfig(sources="x", out="y").subject_pattern) == subject


def test_the_part_of_a_source_depends_on_its_bytes_only(tmp_path):
    pairs = sources.find(
        build_config(IngestConfig, {"sources": write_pairs(tmp_path, 6), "out": "x"}, "t").sources
    ).pairs
    planned = [sources.plan_source(pair, "(.+)") for pair in pairs]
    config = config_of("x", tmp_path, parts=3)
    parts = sources.plan_parts(planned, config)
    assert sorted(source.id for part in parts for source in part) == sorted(source.id for source in planned)
    assert sources.plan_parts(planned[::-1], config) == parts
    assert all([source.id for source in part] == sorted(source.id for source in part) for part in parts)
    assert len(sources.plan_parts(planned, config_of("x", tmp_path, part_bytes=1 + planned[0].size_bytes * 2))) in (
        3,
        4,
    )


def test_a_missing_file_is_a_problem_of_its_source_and_not_an_error(tmp_path):
    image = write_nifti(tmp_path / "a.nii", np.zeros((2, 2, 2), np.int16))
    gone = sources.plan_source(ImageLabel(image=str(tmp_path / "gone.nii")), "(.+)")
    assert gone.problem == ("missing_file", "no such image file")
    half = sources.plan_source(ImageLabel(image=str(image), label=str(tmp_path / "gone.nii")), "(.+)")
    assert half.problem == ("missing_file", "no such label file")


def test_the_split_is_by_subject_and_independent_of_order():
    subjects = {f"s{number}" for number in range(50)}
    held_out = merge.held_out_subjects(subjects, 0.1, seed := 3)
    assert len(held_out) == 5
    assert held_out < subjects
    assert merge.held_out_subjects({f"s{number}" for number in reversed(range(50))}, 0.1, seed) == held_out
    assert merge.held_out_subjects(subjects, 0.1, 4) != held_out
    assert merge.held_out_subjects(subjects, 0, seed) == merge.held_out_subjects({"a"}, 0.5, seed) == set()
    assert len(merge.held_out_subjects({"a", "b"}, 0.01, seed)) == 1
    assert len(merge.held_out_subjects({"a", "b"}, 0.99, seed)) == 1


def test_every_wrong_field_is_named_with_its_full_key():
    tree = {"sources": "x", "out": "y", "modalty": "ct", "intensity": {"kind": "windw"}, "workers": "many"}
    with pytest.raises(ConfigError, match=r"(?s)3 problem.*intensity\.kind.*workers.*modalty"):
        build_config(IngestConfig, tree, "recipe")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"val_fraction": 1}, "val_fraction=1"),
        ({"overlay": "../x"}, "becomes a folder name"),
        ({"subject_pattern": "("}, "subject_pattern"),
        ({"subject_pattern": "x"}, "needs a"),
        ({"workers": 0}, "ingest.workers=0: must be above 0"),
        ({"parts": 0}, "ingest.parts=0"),
        ({"class_names": ["x"] * 256}, "at most 255"),
    ],
)
def test_an_impossible_value_is_named(option, message):
    with pytest.raises(ConfigError, match=message):
        build_config(IngestConfig, {"sources": "x", "out": "y", **option}, "recipe")


def test_ct_padding_stays_out_of_the_statistics_and_air_is_air():
    volume = np.full((1, 10, 10, 10), -1000, np.int16)
    volume[:, :5] = -3024
    volume[:, 6:9, 2:7, 3:6] = 40
    (stats,), box = statistics.describe(volume, "ct")
    assert stats.p0_5 == -1000
    assert stats.foreground_mean == 40
    assert stats.foreground_std == 0
    assert box == ((6, 9), (2, 7), (3, 6))
    assert statistics.fill_value(volume, "ct") == -1024
    assert statistics.fill_value(volume.astype(np.uint8), "ct") == volume.astype(np.uint8).min()
    assert statistics.fill_value(volume, "mr") == -3024


def test_mr_foreground_is_what_is_brighter_than_air():
    random = np.random.RandomState(0)
    volume = np.abs(random.randn(1, 20, 20, 20) * 10).astype(np.float32)
    volume[:, 4:15, 5:12, 6:9] += 300
    (stats,), box = statistics.describe(volume, "mr")
    assert box == ((4, 15), (5, 12), (6, 9))
    assert stats.foreground_mean == pytest.approx(308, abs=2)
    assert stats.p50 < 20


@pytest.mark.parametrize("modality", ["ct", "mr"])
def test_a_constant_volume_has_statistics_and_all_of_it_is_foreground(modality):
    (stats,), box = statistics.describe(np.full((1, 2, 3, 4), -2000, np.int16), modality)
    assert (stats.mean, stats.std, stats.foreground_std) == (-2000, 0, 0)
    assert box == ((0, 2), (0, 3), (0, 4))


def test_the_subject_key_is_private_and_must_not_change(tmp_path):
    store = tmp_path / "store"
    key = merge.subject_key(store, None)
    file = tmp_path / "store.subject_key"
    assert file.stat().st_mode & 0o777 == 0o600
    assert merge.subject_key(store, str(file)) == key
    file.chmod(0o644)
    with pytest.raises(ConfigError, match=r"mode 0644 lets others read the subject key; run chmod 600"):
        merge.subject_key(store, None)
    file.write_text("hello")
    file.chmod(0o600)
    with pytest.raises(ConfigError, match="not a subject key"):
        merge.subject_key(store, None)
