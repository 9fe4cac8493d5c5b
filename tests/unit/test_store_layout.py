import dataclasses
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from store_samples import make_store, rows_of
from stream_stores import write_store

from mimscale.errors import DataError
from mimscale.store.intensity import ChannelStats, IntensityContract, normalisation
from mimscale.store.layout import info_path, manifest_path, read_info
from mimscale.store.manifest import SAMPLE_COLUMNS, TRAINING_COLUMNS, Manifest, load_manifest, write_manifest

STATS = ChannelStats(p0_5=-3, p50=10, p99_5=90, mean=12, std=7, foreground_mean=40, foreground_std=5)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("layout"), count=4)


def test_a_folder_without_store_json_is_named_with_the_way_out(tmp_path):
    with pytest.raises(DataError, match=r"store\.json: No such file.*mimscale ingest"):
        read_info(tmp_path)


def test_a_store_of_another_format_version_is_refused_with_both_versions(tmp_path):
    info_path(tmp_path).write_text(json.dumps({"format_version": 7}))
    with pytest.raises(DataError, match=r"version 7, this mimscale reads version 2; ingest the sources again"):
        read_info(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"axes": "czyx"}'])
def test_a_store_json_that_is_none_is_refused(tmp_path, text):
    info_path(tmp_path).write_text(text)
    with pytest.raises(DataError, match="not the description of a store"):
        read_info(tmp_path)


def test_a_store_json_with_a_lost_field_names_the_field(tmp_path, store):
    tree = json.loads(info_path(store).read_text())
    del tree["chunk_voxels"]
    info_path(tmp_path).write_text(json.dumps(tree))
    with pytest.raises(DataError, match=r"(?s)chunk_voxels.*damaged"):
        read_info(tmp_path)


def test_store_json_says_how_to_read_the_store(store):
    info = read_info(store)
    assert (info.axes, info.chunk_voxels, info.codec, info.num_parts) == ("czyx", 16, "zstd", 2)
    assert info.overlays["label"].class_names == ("air", "dark", "bright")
    assert info.intensity == IntensityContract(kind="zscore")


def test_a_store_without_manifest_says_that_the_ingest_has_not_ended(tmp_path, store):
    info_path(tmp_path).write_bytes(info_path(store).read_bytes())
    with pytest.raises(DataError, match="the ingest of this store has not ended; run the same ingest command again"):
        load_manifest(tmp_path)


def test_a_damaged_manifest_is_named(tmp_path, store):
    info_path(tmp_path).write_bytes(info_path(store).read_bytes())
    manifest_path(tmp_path).write_bytes(manifest_path(store).read_bytes()[:-40])
    with pytest.raises(DataError, match=r"manifest\.parquet: damaged"):
        load_manifest(tmp_path)


def test_rows_are_sorted_by_id_and_columns_agree_with_them(store):
    manifest, rows = load_manifest(store), rows_of(store)
    assert [row.id for row in rows] == sorted(row.id for row in rows)
    assert manifest.column("shape").tolist() == [list(row.shape) for row in rows]
    assert manifest.column("foreground_box").tolist() == [[list(axis) for axis in row.foreground_box] for row in rows]
    assert manifest.column("id").tolist() == [row.id for row in rows]
    assert [manifest.index_of(row.id) for row in rows] == [0, 1, 2, 3]
    assert rows[0].shape == (1, 21, 37, 40)
    assert rows[0].spacing_mm == (2.0, 1.5, 1.0)
    assert sum(rows[0].overlays["label"].class_voxels) == 21 * 37 * 40


def test_an_unknown_volume_is_named(store):
    with pytest.raises(DataError, match="'nothing': not among the 4 volumes"):
        load_manifest(store).index_of("nothing")


def test_select_takes_the_rows_of_a_split(store):
    manifest = load_manifest(store)
    train, val = manifest.select(split="train"), manifest.select(split="val")
    assert sorted([*train, *val]) == [0, 1, 2, 3]
    assert len(val) == 1
    assert manifest.select(split="val", modality="ct").tolist() == []


def test_the_plan_fingerprint_covers_order_and_nothing_else(store):
    manifest = load_manifest(store)
    table = manifest._table
    relicensed = table.set_column(table.schema.get_field_index("licence"), table.schema.field("licence"), [["x"] * 4])
    everything = np.arange(4)
    assert Manifest(relicensed).plan_fingerprint(everything) == manifest.plan_fingerprint(everything)
    assert manifest.plan_fingerprint(everything[::-1]) != manifest.plan_fingerprint(everything)
    assert manifest.plan_fingerprint(everything[:3]) != manifest.plan_fingerprint(everything)


def test_a_window_becomes_zero_to_one():
    rows = normalisation(IntensityContract(kind="window", window=(-1000, 1000)), [STATS])
    low, high, shift, scale = rows[0]
    stored = np.array([-2000, -1000, 0, 1000, 3000])
    assert ((np.clip(stored, low, high) - shift) * scale).tolist() == pytest.approx([0, 0, 0.5, 1, 1])


@pytest.mark.parametrize(
    ("kind", "shift", "scale"), [("zscore", 12, pytest.approx(1 / 7)), ("zscore_foreground", 40, pytest.approx(1 / 5))]
)
def test_a_z_score_clips_to_percentiles_and_uses_the_statistics_that_were_asked_for(kind, shift, scale):
    rows = normalisation(IntensityContract(kind=kind), [STATS, STATS])
    assert rows.dtype == np.float32
    assert rows.tolist() == [[-3, 90, shift, scale]] * 2


def test_a_constant_channel_becomes_zero_and_not_infinite():
    constant = ChannelStats(p0_5=4, p50=4, p99_5=4, mean=4, std=0, foreground_mean=4, foreground_std=0)
    low, high, shift, scale = normalisation(IntensityContract(), [constant])[0]
    assert (np.clip(4, low, high) - shift) * scale == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "window"}, "needs \\[low, high\\]"),
        ({"kind": "window", "window": (5, 5)}, "low must be below high"),
        ({"kind": "zscore", "window": (0, 5)}, "has no effect"),
    ],
)
def test_an_impossible_contract_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        IntensityContract(**options)


def test_only_the_columns_that_were_asked_for_are_read(store):
    manifest = load_manifest(store, TRAINING_COLUMNS)
    assert set(manifest._table.column_names) == set(TRAINING_COLUMNS)
    assert not {"affine", "sha256", "voxels_sha256", "source_sha256", "source_affine"} & set(TRAINING_COLUMNS)


def test_a_sample_row_is_a_part_of_the_row(store):
    whole, part = load_manifest(store), load_manifest(store, TRAINING_COLUMNS)
    for index, row in enumerate(rows_of(store)):
        sample = part.sample_row(index)
        assert sample == whole.sample_row(index)
        assert {name: getattr(sample, name) for name in SAMPLE_COLUMNS} == {
            name: getattr(row, name) for name in SAMPLE_COLUMNS
        }


def test_overlays_are_found_and_their_classes_summed_without_rows(tmp_path):
    shapes = [(20, 16, 16), (10, 10, 30), (8, 8, 8)]
    manifest, rows = write_store(tmp_path, shapes), rows_of(tmp_path)
    bare = [dataclasses.replace(rows[1], overlays={})]
    write_manifest(tmp_path, [rows[0], *bare, rows[2]])
    manifest = load_manifest(tmp_path)
    assert manifest.overlay_parts("label").tolist() == [0, -1, 2]
    assert manifest.overlay_parts("other").tolist() == [-1, -1, -1]
    expected = np.add(rows[0].overlays["label"].class_voxels, rows[2].overlays["label"].class_voxels)
    assert manifest.class_voxels("label", np.array([2, 1, 0])).tolist() == expected.tolist()
    assert manifest.class_voxels("label", np.array([1])).tolist() == []


def test_rows_can_be_taken_and_values_counted(store):
    manifest, rows = load_manifest(store), rows_of(store)
    assert [manifest.take(np.array([2, 0])).row(place) for place in (0, 1)] == [rows[2], rows[0]]
    assert manifest.value_counts("split") == {"train": 3, "val": 1}


def test_row_groups_change_nothing(store, monkeypatch, tmp_path):
    monkeypatch.setattr("mimscale.store.manifest.ROW_GROUP_ROWS", 3)
    info_path(tmp_path).write_bytes(info_path(store).read_bytes())
    write_manifest(tmp_path, rows_of(store))
    assert pq.ParquetFile(manifest_path(tmp_path)).num_row_groups == 2
    assert rows_of(tmp_path) == rows_of(store)
