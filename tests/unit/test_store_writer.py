"""What a pack writer may cost: bytes on disk, memory, and the 64-bit sizes of a big entry."""

import tracemalloc
import zipfile

import numpy as np
import pytest

from mimscale.store import shard
from mimscale.store.writer import PackWriter


def noisy_ct(shape=(64, 96, 96)):
    """Noise of 20 HU around soft tissue: its low bits are random, its high bits are not."""
    return (np.random.RandomState(0).randn(1, *shape) * 20 + 40).astype(np.int16)


def smooth_mr(shape=(64, 96, 96)):
    """8-bit intensities that change slowly."""
    z, y, x = np.meshgrid(*(np.linspace(0, 3, edge) for edge in shape), indexing="ij")
    return (120 + 100 * np.sin(z * y + x))[None].astype(np.uint8)


def encoded_bytes(volume, codec, shuffle):
    return sum(len(piece) for piece in shard.encode_shard(volume, 0, 32, shard.Blosc(*codec, shuffle)))


@pytest.mark.parametrize("make", [noisy_ct, smooth_mr])
def test_the_shuffle_is_the_one_that_makes_the_volume_smaller(make):
    volume = make()
    sizes = {shuffle: encoded_bytes(volume, ("zstd", 3), shuffle) for shuffle in ("shuffle", "bitshuffle")}
    chosen = shard.choose_blosc(volume, 0, 32, "zstd")
    assert sizes[chosen.shuffle] == min(sizes.values())


@pytest.mark.parametrize("make", [noisy_ct, smooth_mr])
def test_the_preset_for_reading_shuffles_bytes_whatever_the_volume(make):
    assert shard.choose_blosc(make(), 0, 32, "fast") == shard.Blosc("lz4hc", 5, "shuffle")


def test_a_chunk_in_the_middle_of_much_air_decides_too():
    volume = np.zeros((1, 256, 64, 64), np.int16)
    volume[0, 96:160] = noisy_ct((64, 64, 64))[0]
    assert shard.choose_blosc(volume, 0, 32, "zstd") == shard.choose_blosc(noisy_ct(), 0, 32, "zstd")


def test_a_volume_of_nothing_but_air_has_settings_and_no_chunk():
    volume = np.full((1, 40, 40, 40), -7, np.int16)
    blosc = shard.choose_blosc(volume, -7, 32, "zstd")
    (index,) = shard.encode_shard(volume, -7, 32, blosc)
    assert len(index) == shard.index_bytes(volume.shape, 32)


@pytest.mark.parametrize("order", ["C", "F"])
def test_the_memory_layout_of_a_volume_changes_no_byte(order):
    volume = noisy_ct()
    blosc = shard.choose_blosc(volume, 0, 32, "zstd")
    laid_out = np.asarray(volume, order=order)
    assert shard.choose_blosc(laid_out, 0, 32, "zstd") == blosc
    assert b"".join(shard.encode_shard(laid_out, 0, 32, blosc)) == b"".join(shard.encode_shard(volume, 0, 32, blosc))


def test_writing_a_volume_takes_a_small_part_of_its_memory(tmp_path):
    volume = noisy_ct((160, 256, 256))  # 21 MB; its shard alone would take half of that
    with PackWriter(tmp_path / "pack.zarr.zip", chunk_voxels=32, codec="zstd") as pack:
        tracemalloc.start()
        pack.add("a", volume, fill_value=0, spacing_mm=(1, 1, 1), attributes={})
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak_bytes < volume.nbytes / 8


def test_a_volume_beyond_the_limit_of_32_bit_sizes_has_64_bit_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100_000)  # instead of 2 GiB
    path, volume = tmp_path / "pack.zarr.zip", noisy_ct()
    with PackWriter(path, chunk_voxels=32, codec="zstd") as pack:
        places = [pack.add(name, volume, fill_value=0, spacing_mm=(1, 1, 1), attributes={}) for name in "ab"]
    monkeypatch.undo()
    data = path.read_bytes()
    with zipfile.ZipFile(path) as pack:
        assert pack.testzip() is None
        for name, place in zip("ab", places, strict=True):
            entry = pack.read(f"{name}/0/c.0.0.0.0")
            assert entry == data[place.offset_bytes : place.offset_bytes + place.length_bytes]
            assert len(entry) > 100_000
