"""The plan: which source goes into which part, what is new, and how it is kept."""

import os

import pytest
from store_samples import config_of

from mimscale.config import config_tree
from mimscale.errors import DataError
from mimscale.ingest.plan import Plan, new_sources, plan_path, plan_round, read_plan, write_plan
from mimscale.ingest.sources import Source
from mimscale.ingest.subjects import splits


def sources_in(folder, count=30, label=False):
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for number in range(count):
        (folder / f"{number}.nii").write_bytes(b"x" * (100 + number))
        (folder / f"{number}_label.nii").write_bytes(b"y")
        labels = (str(folder / f"{number}_label.nii"),) if label else ()
        found.append(Source(channels=((str(folder / f"{number}.nii"),),), label=labels, subject=f"s{number % 7}"))
    return found


def round_of(found, **options):
    settings = {"first_part": 0, "num_parts": 4, "part_bytes": 1, "config": {"overlay": "label"}, "class_names": ()}
    return plan_round(found, **{**settings, **options})


def parts_of(one):
    return {os.path.basename(source.image[0]): source.part for source in one.sources}


def test_the_part_of_a_source_depends_on_its_name_below_the_common_folder_only(tmp_path):
    here, there = sources_in(tmp_path / "here"), sources_in(tmp_path / "elsewhere" / "deep")
    assert parts_of(round_of(here)) == parts_of(round_of(there)) == parts_of(round_of(here[::-1]))
    assert [one.image for one in round_of(here).sources] == [one.image for one in round_of(here[::-1]).sources]
    assert set(parts_of(round_of(here)).values()) == {0, 1, 2, 3}
    assert set(parts_of(round_of(here, first_part=9)).values()) == {9, 10, 11, 12}


def test_the_number_of_parts_follows_from_the_size_of_the_sources(tmp_path):
    found = sources_in(tmp_path, 10)
    total = sum(100 + number for number in range(10))
    assert round_of(found, num_parts=None, part_bytes=total).num_parts == 1
    assert round_of(found, num_parts=None, part_bytes=total - 1).num_parts == 2
    assert round_of([], num_parts=None).num_parts == 1


def test_a_plan_is_private_and_comes_back_as_it_was(tmp_path):
    plan = Plan((round_of(sources_in(tmp_path / "a")), round_of(sources_in(tmp_path / "b", label=True), first_part=4)))
    write_plan(tmp_path / "store", plan)
    assert plan_path(tmp_path / "store").stat().st_mode & 0o777 == 0o600
    assert read_plan(tmp_path / "store") == plan
    assert plan.num_parts == 8


def test_a_damaged_plan_is_an_error_that_names_it(tmp_path):
    write_plan(tmp_path / "store", Plan((round_of(sources_in(tmp_path / "a")),)))
    path = plan_path(tmp_path / "store")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"store\.plan\.jsonl: damaged .*restore it"):
        read_plan(tmp_path / "store")


def test_new_is_what_was_not_there_what_has_changed_and_another_label_or_overlay(tmp_path):
    found = sources_in(tmp_path, 3)
    plan = Plan((round_of(found),))
    assert new_sources(plan, found, "label") == []
    later = sources_in(tmp_path, 5)  # writes the first three again: other files with the same names
    os.utime(tmp_path / "0.nii", ns=(1, 1))
    assert later[3] in new_sources(plan, later, "label")
    assert later[0] in new_sources(plan, later, "label")
    plan = Plan((round_of(later),))
    labelled = [Source(channels=one.channels, label=(str(tmp_path / "0_label.nii"),), subject="s") for one in later]
    assert new_sources(plan, labelled, "label") == labelled
    plan = Plan((round_of(later), round_of(labelled, first_part=4)))
    assert new_sources(plan, labelled, "label") == []
    assert new_sources(plan, labelled, "exclude") == labelled
    assert new_sources(plan, later, "label") == []


def test_subjects_keep_the_split_that_they_had_or_that_the_list_gives_them():
    asked = {**{f"new{number}": None for number in range(10)}, "listed": "val", "old": None}
    chosen = splits(asked, {"old": "val"}, 0.25, 1)
    assert (chosen["listed"], chosen["old"]) == ("val", "val")
    assert sum(split == "val" for split in chosen.values()) == 3  # a quarter of twelve, two of them decided
    assert splits(asked, {"old": "train"}, 0.0, 1)["old"] == "train"


def test_the_settings_of_a_task_are_no_part_of_the_config_that_must_stay(tmp_path):
    from mimscale.ingest.config import OUTSIDE_HASH

    assert (
        {"task", "merge", "remove", "workers", "out", "sources"}
        <= set(OUTSIDE_HASH)
        <= set(config_tree(config_of("x", tmp_path)))
    )
