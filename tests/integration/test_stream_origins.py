"""Crops placed by the maps of chunks that an ingest writes: from real files, without touching a voxel."""

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_samples import config_of, make_store, opened, rows_of, write_nifti, write_pairs

from mimscale.errors import ConfigError, DataError
from mimscale.ingest import statistics
from mimscale.ingest.run import ingest
from mimscale.store import layout
from mimscale.store.chunk_maps import chunk_maps_of, chunk_maxima, load_chunk_maps
from mimscale.store.manifest import TRAINING_COLUMNS, load_manifest, write_manifest
from mimscale.store.reader import ShardReader
from mimscale.store.verify import verify
from mimscale.stream.config import StreamConfig
from mimscale.stream.plan import FixedPlan, SamplePlan

CHUNK = 16
CROP = (20, 18, 24)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four phantoms of [Z, Y, X] = 51 x 67 x 60 voxels with classes 0, 1, 2, and one of nothing but air."""
    folder = tmp_path_factory.mktemp("origins")
    sources = write_pairs(folder / "sources", 4, shape=(60, 67, 51))
    air = np.zeros((60, 67, 51), np.int16)
    write_nifti(folder / "sources" / "images" / "empty.nii.gz", air)
    write_nifti(folder / "sources" / "labels" / "empty.nii.gz", air.astype(np.uint8))
    ingest(config_of(sources, folder / "store", parts=2, chunk_voxels=CHUNK, val_fraction=0))
    return folder / "store"


def places(mask: np.ndarray) -> list[list[int]]:
    """Grid places of the chunks of a mask [Z, Y, X] that hold a True, one chunk after the other."""
    grid = [-(-edge // CHUNK) for edge in mask.shape]
    return [
        list(corner)
        for corner in np.ndindex(*grid)
        if mask[tuple(slice(c * CHUNK, (c + 1) * CHUNK) for c in corner)].any()
    ]


def test_maps_say_which_chunks_hold_foreground_and_each_class(store: Path) -> None:
    manifest, reader = opened(store)
    maps = load_chunk_maps(store, manifest)
    assert len(maps) == len(manifest) == 5
    with_label = 0
    for index, row in enumerate(rows_of(store)):
        volume, label = reader.read_volume(row), reader.read_volume(row, "label")[0]
        _, _, (threshold,) = statistics.measure(volume, "mr")
        assert maps.occupied(index, row.shape[1:]).tolist() == places(volume[0] > threshold)
        classes = maps.labelled(index, "label", row.shape[1:])
        expected = [places(label == number) for number in range(1, 3) if (label == number).any()]
        assert [found.tolist() for found in classes] == expected
        with_label += bool(expected)
        assert maps.labelled(index, "other", row.shape[1:]) == []
    assert with_label == 4


def test_the_largest_voxel_of_each_chunk_is_that_of_a_loop() -> None:
    voxels = np.random.default_rng(0).integers(-500, 500, (33, 16, 20))
    maxima = chunk_maxima(voxels, CHUNK)
    assert maxima.shape == (3, 1, 2)
    for z, y, x in np.ndindex(*maxima.shape):
        assert maxima[z, y, x] == voxels[z * 16 : z * 16 + 16, y * 16 : y * 16 + 16, x * 16 : x * 16 + 16].max()


def test_training_finds_the_maps_beside_a_manifest_of_few_columns_and_after_pickling(store: Path) -> None:
    manifest = load_manifest(store, TRAINING_COLUMNS)
    maps = load_chunk_maps(store, manifest)
    again = pickle.loads(pickle.dumps(maps))
    shape = manifest.sample_row(0).shape[1:]
    assert np.array_equal(again.occupied(0, shape), maps.occupied(0, shape))


def a_plan(store: Path, overlay: str | None = None, crop: tuple[int, int, int] = CROP, **changes: Any) -> SamplePlan:
    manifest = load_manifest(store, TRAINING_COLUMNS)
    config = StreamConfig(**changes)
    indices = np.arange(len(manifest))
    return SamplePlan.of(
        manifest,
        indices,
        seed=3,
        crop_voxels=crop,
        config=config,
        global_batch=4,
        store=store,
        overlay=overlay,
    )


@pytest.mark.parametrize("align", [1, 4, 16])
def test_a_crop_at_foreground_holds_a_whole_chunk_with_foreground(store: Path, align: int) -> None:
    plan = a_plan(store, origins="occupied", align_voxels=align)
    maps = load_chunk_maps(store, load_manifest(store))
    samples = plan.samples(np.arange(2000))
    seen = set()
    for volume, origin in zip(samples.volume.tolist(), samples.origin, strict=True):
        shape = plan.crops.shapes[volume]
        assert (origin >= 0).all()
        assert (origin + CROP <= shape).all()
        chunks = maps.occupied(volume, shape)
        start, stop = chunks * CHUNK, np.minimum(chunks * CHUNK + CHUNK, shape)
        held = ((start >= origin) & (stop <= origin + CROP)).all(axis=1)
        assert held.any() or not len(chunks)
        seen |= {(volume, *chunk) for chunk in chunks[held].tolist()}
    # Every chunk has its turn: the border chunks too.
    expected = {
        (volume, *chunk) for volume in range(5) for chunk in maps.occupied(volume, plan.crops.shapes[volume]).tolist()
    }
    assert len(seen) > 0.95 * len(expected)


@pytest.mark.parametrize(("pos_neg", "share"), [((1, 0), 1.0), ((1, 1), 0.5), ((3, 1), 0.75)])
def test_crops_are_drawn_at_labels_as_often_as_asked_and_at_each_class_equally_often(
    store: Path, pos_neg: tuple[float, float], share: float
) -> None:
    crop = (16, 16, 16)  # of a chunk's size: only the crop at a chunk itself holds it
    plan = a_plan(store, overlay="label", crop=crop, origins="labelled", pos_neg=pos_neg)
    maps = load_chunk_maps(store, load_manifest(store))
    samples = plan.samples(np.arange(1600))
    at_label = np.zeros(2)
    labelled = 0
    for volume, origin in zip(samples.volume.tolist(), samples.origin, strict=True):
        shape = plan.crops.shapes[volume]
        classes = maps.labelled(volume, "label", shape)
        if not classes:
            continue
        labelled += 1
        for number, chunks in enumerate(classes):
            starts = np.minimum(chunks * CHUNK, shape - CHUNK)  # a cut chunk at the border is held by the last crop
            at_label[number] += (starts == origin).all(axis=1).any()
    assert labelled > 1000
    # Both classes share most chunks of the phantom, so that each of them is met at least as often as it is drawn.
    assert abs(at_label.max() / labelled - share) < 0.05 + (0.02 if pos_neg[1] else 0)
    assert at_label.min() / labelled > share / 2 - 0.05


def test_a_volume_without_labels_gives_crops_from_anywhere(store: Path) -> None:
    plan = a_plan(store, overlay="label", origins="labelled", pos_neg=(1, 0))
    maps = load_chunk_maps(store, load_manifest(store))
    (empty,) = (v for v in range(5) if not maps.labelled(v, "label", plan.crops.shapes[v]))
    samples = plan.samples(np.arange(400))
    origins = samples.origin[samples.volume == empty]
    assert len(np.unique(origins[:, 0])) > 15


def test_placing_crops_opens_no_pack(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a pack was read")

    monkeypatch.setattr(ShardReader, "__init__", refuse)
    a_plan(store, origins="occupied").samples(np.arange(50))
    a_plan(store, overlay="label", origins="labelled").samples(np.arange(50))


def test_fixed_crops_can_be_placed_by_labels(store: Path) -> None:
    manifest = load_manifest(store)
    config = StreamConfig(origins="labelled", crops_per_volume=3)
    plans = [
        FixedPlan.of(
            manifest, np.arange(5), seed=1, crop_voxels=CROP, config=config, store=store, overlay="label"
        ).samples(np.arange(15))
        for _ in range(2)
    ]
    assert np.array_equal(plans[0].origin, plans[1].origin)


def test_labelled_origins_without_an_overlay_are_refused(store: Path) -> None:
    with pytest.raises(ConfigError, match=r"stream\.origins=labelled: needs an overlay"):
        a_plan(store, origins="labelled")


def test_the_order_changes_with_the_labels_that_it_depends_on(store: Path, tmp_path: Path) -> None:
    rows = rows_of(store)
    other = tmp_path / "store"
    other.mkdir()
    layout.write_info(other, layout.read_info(store))
    before = a_plan(store, overlay="label", origins="labelled").plan_hash
    assert a_plan(store, overlay="label", origins="occupied").plan_hash == a_plan(store, origins="occupied").plan_hash
    label = dataclasses.replace(rows[0].overlays["label"], sha256="f" * 64)
    with_maps = [dataclasses.replace(row, occupied_chunks=encoded()) for row in rows]
    write_manifest(other, [dataclasses.replace(with_maps[0], overlays={"label": label}), *with_maps[1:]])
    assert a_plan(other, overlay="label", origins="labelled").plan_hash != before


def encoded() -> str:
    from mimscale.store.chunk_maps import encode_map

    return encode_map(np.ones((4, 5, 4), dtype=bool))


def test_a_store_without_maps_says_so(store: Path, tmp_path: Path) -> None:
    layout.write_info(tmp_path, layout.read_info(store))
    write_manifest(tmp_path, rows_of(store))  # rows from a manifest hold no maps
    assert chunk_maps_of(tmp_path, load_manifest(tmp_path)) is None
    assert not list(tmp_path.glob("chunk_maps*"))
    with pytest.raises(DataError, match=r"was ingested without maps of its chunks.*use stream\.origins=foreground"):
        a_plan(tmp_path, origins="occupied")


def test_maps_that_are_missing_cut_or_changed_are_named(tmp_path: Path) -> None:
    store = make_store(tmp_path, count=2)
    path = chunk_maps_of(store, load_manifest(store))
    assert path is not None
    whole = path.read_bytes()
    assert verify(store) == []
    path.write_bytes(whole[:-10])
    with pytest.raises(
        DataError, match=rf"chunk_maps-.*: has {len(whole) - 10} bytes instead of {len(whole)}; restore"
    ):
        a_plan(store, origins="occupied")
    path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    (bad,) = verify(store)
    assert (bad.path, "another sha256" in bad.reason) == (str(path), True)
    path.unlink()
    (bad,) = verify(store)
    assert "cannot be read (No such file" in bad.reason
    with pytest.raises(DataError, match=r"chunk_maps-.*No such file.*restore it, or run the same ingest command again"):
        a_plan(store, origins="occupied")
    # The same command makes it again, from the receipts.
    sources = {kind: str(tmp_path / "sources" / kind / "*.nii.gz") for kind in ("images", "labels")}
    (store / "manifest.parquet").unlink()
    ingest(config_of(sources, store, parts=2, chunk_voxels=16))
    assert path.read_bytes() == whole


def test_a_store_that_grows_has_one_file_of_maps_and_it_fits(tmp_path: Path) -> None:
    store = make_store(tmp_path, count=2)
    first = chunk_maps_of(store, load_manifest(store))
    write_pairs(tmp_path / "sources", 4)
    sources = {kind: str(tmp_path / "sources" / kind / "*.nii.gz") for kind in ("images", "labels")}
    ingest(config_of(sources, store, parts=2, chunk_voxels=16))
    manifest = load_manifest(store)
    assert len(load_chunk_maps(store, manifest)) == len(manifest) == 4
    assert list(store.glob("chunk_maps*")) == [chunk_maps_of(store, manifest)]
    assert first != chunk_maps_of(store, manifest)
