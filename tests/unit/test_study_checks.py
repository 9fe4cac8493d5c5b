from dataclasses import replace

import numpy as np
import pytest
from small_segmentation import make_store
from stream_stores import write_store

from mimscale.store.manifest import load_manifest
from mimscale.stream.config import StreamConfig
from mimscale.stream.subjects import first_subjects, in_split, places
from mimscale.study.checks import VolumeUse, seen_in_pretraining, store_problems, used_rows
from mimscale.study.config import ExpectConfig

GOOD = {
    "train": 0,
    "val": 3,
    "volumes": 3,
    "channels": 1,
    "class_names": ("background", "grey", "white"),
    "every_class_in": 1.0,
    "spacing_mm": ((0.9, 0.4, 0.4), (3.1, 2.1, 2.1)),
    "modality": "mr",
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store"))


def test_a_store_as_it_should_be_has_no_problem(store):
    assert store_problems(store, ExpectConfig(**GOOD)) == []
    assert store_problems(store, ExpectConfig()) == []


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"train": 24}, "0 volumes to train, expected 24"),
        ({"val": 6}, "3 volumes to val, expected 6"),
        ({"volumes": 30}, "3 volumes, expected 30"),
        ({"channels": 4}, "channels of 3 volume(s): aaaa has 1"),
        ({"class_names": ("background", "liver")}, "classes background, grey, white; expected background, liver"),
        ({"overlay": "organs"}, "no overlay 'organs'"),
        ({"spacing_mm": ((2, 1.5, 1.5), (2, 1.5, 1.5))}, "spacing_mm of"),
        ({"shape": ((155, 240, 240), (155, 240, 240))}, "expected 155 x 240 x 240"),
        ({"modality": "ct"}, "modality mr, expected ct"),
    ],
)
def test_each_way_in_which_data_are_not_what_they_should_be_is_named(store, changes, text):
    (problem,) = store_problems(store, ExpectConfig(**{**GOOD, **changes}))
    assert text in problem


def test_a_class_that_too_few_volumes_have_is_named(store, monkeypatch):
    from mimscale.store.manifest import Manifest

    counts = {0: [9, 9, 0], 1: [9, 9], 2: [9, 9, 4]}
    monkeypatch.setattr(Manifest, "class_voxels", lambda self, name, rows: np.array(counts[int(rows[0])]))
    (problem,) = store_problems(store, ExpectConfig(**GOOD))
    assert problem == "class white is in 1 of 3 labelled volumes; expected in 3"


def use(store, split, **stream):
    return VolumeUse(store=store, split=split, stream=StreamConfig(**stream))


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Twenty volumes, each of a subject of its own."""
    folder = tmp_path_factory.mktemp("many")
    write_store(folder, [(16, 16, 16)] * 20)
    return folder


def test_validation_volumes_in_pretraining_are_found_by_their_source_whatever_the_store(store, tmp_path):
    copy = make_store(tmp_path, split="train")
    (first, *rest) = seen_in_pretraining(use(copy, "train"), [use(store, "val")])
    assert first == f"{store}: volume aaaa"
    assert len(rest) == 2
    assert seen_in_pretraining(use(copy, "train", filter='id == "bbbb"'), [use(store, "val")]) == [
        f"{store}: volume bbbb"
    ]
    assert seen_in_pretraining(use(copy, "val"), [use(store, "val")]) == []


def test_folds_split_subjects_and_their_validation_parts_make_up_the_whole(many):
    manifest = load_manifest(many)
    validated = []
    for fold in range(4):
        config = StreamConfig(fold=f"{fold}/4")
        val, train = in_split(manifest, "val", config), in_split(manifest, "train", config)
        assert np.array_equal(val, ~train)
        assert seen_in_pretraining(use(many, "train", fold=f"{fold}/4"), [use(many, "val", fold=f"{fold}/4")]) == []
        validated += list(np.flatnonzero(val))
    assert sorted(validated) == list(range(len(manifest)))
    assert seen_in_pretraining(use(many, "train", fold="0/4"), [use(many, "val", fold="1/4")])


def test_smaller_fractions_are_parts_of_larger_ones_and_keep_subjects_whole():
    class Table:
        def column(self, name):
            assert name == "subject"
            return np.array([f"s{number % 7}" for number in range(21)], dtype=object)

    rows = np.arange(21)
    kept = {share: first_subjects(Table(), rows, share) for share in (0.1, 0.25, 0.5, 1.0)}
    assert [len(kept[share]) for share in kept] == [3, 6, 12, 21]  # 1, 2, 4 and 7 subjects of three volumes
    for smaller, larger in ((0.1, 0.25), (0.25, 0.5), (0.5, 1.0)):
        assert set(kept[smaller]) < set(kept[larger])
    for share, chosen in kept.items():
        subjects = {number % 7 for number in chosen}
        assert all(number in chosen for number in range(21) if number % 7 in subjects), share


def test_the_order_of_subjects_depends_on_their_names_alone():
    names = np.array(["b", "a", "c", "a"], dtype=object)
    place = dict(zip(names, places(names), strict=True))
    assert place == dict(zip(["c", "a", "b"], places(np.array(["c", "a", "b"], dtype=object)), strict=True))
    assert sorted(place.values()) == [0, 1, 2]
    # Golden: an order that changed would change the volumes of every fraction and fold without a word.
    assert [place[name] for name in "abc"] == GOLDEN


GOLDEN = [2, 1, 0]


def test_what_training_reads_is_what_the_check_says(many):
    from mimscale.config import build_config
    from mimscale.train.config import PretrainConfig
    from mimscale.train.training_data import TrainingData

    tree = {
        "store": str(many),
        "run_dir": "x",
        "steps": 1,
        "global_batch": 2,
        "micro_batch": 2,
        "crop_voxels": [16, 16, 16],
        "patch_voxels": [8, 8, 8],
        "stream": {"fold": "1/4", "train_fraction": 0.3},
    }
    config = build_config(PretrainConfig, tree, "test")
    data = TrainingData(config, None)
    manifest = load_manifest(many)
    assert list(data.train) == list(used_rows(use(many, "train", fold="1/4", train_fraction=0.3), manifest))
    assert list(data.validation) == list(used_rows(use(many, "val", fold="1/4"), manifest))
    assert len(data.train) == 5  # three tenths of fifteen subjects, rounded up


def test_a_run_of_a_share_of_the_labels_is_scored_on_all_volumes_and_all_of_them_are_held_out(many):
    from mimscale.config import build_config
    from mimscale.evaluate.config import EvaluateConfig
    from mimscale.study.nodes import tested_on
    from mimscale.train.config import FinetuneConfig

    stream = {"train_fraction": 0.25, "fold": "0/4"}
    tree = {"store": "/labelled", "run_dir": "x", "steps": 1, "global_batch": 2, "micro_batch": 2, "stream": stream}
    tree |= {"unetr": {"num_classes": 2}}
    run = build_config(FinetuneConfig, tree | {"crop_voxels": [16] * 3, "patch_voxels": [8] * 3}, "test")
    tested = tested_on(run, EvaluateConfig(run_dir=run.run_dir, store=many, split="train"))
    manifest = load_manifest(many)
    tested = replace(tested, overlay=None)  # these volumes have none
    assert len(used_rows(tested, manifest)) == len(manifest) == 20
    assert len(seen_in_pretraining(use(many, "train"), [tested])) == 20


@pytest.mark.parametrize("fold", ["5/5", "1", "0/1", "-1/5", "a/b"])
def test_a_fold_that_is_none_is_refused(fold):
    with pytest.raises(ValueError, match=r"stream.fold=.*expected I/N"):
        StreamConfig(fold=fold)
