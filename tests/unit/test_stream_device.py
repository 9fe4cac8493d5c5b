from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from mimscale.errors import DataError
from mimscale.stream.batch import Batch
from mimscale.stream.device import OnDevice, labels, normalise, valid_voxels


def a_batch(volume: torch.Tensor, rows: list[list[list[float]]], inside: list[list[list[int]]]) -> Batch:
    return Batch(
        volume=volume,
        label=None,
        sample_ids=torch.arange(len(volume)),
        seeds=list(range(len(volume))),
        spacing_mm=[(1.0, 1.0, 1.0)],
        normalisation=torch.tensor(rows),
        inside=torch.tensor(inside, dtype=torch.int32),
        volume_ids=["a"] * len(volume),
        counted=torch.ones(len(volume), dtype=torch.bool),
    )


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.uint16, np.int32, np.float32])
def test_each_sample_and_channel_is_clipped_shifted_and_scaled_by_its_own_row(dtype: type) -> None:
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 250, (2, 2, 3, 4, 5)).astype(dtype)
    rows = [[[10.0, 200.0, 100.0, 0.5], [0.0, 50.0, 0.0, 0.02]], [[20.0, 30.0, 25.0, 2.0], [5.0, 240.0, 1.0, 1.0]]]
    image, valid = normalise(a_batch(torch.from_numpy(raw), rows, [[[0, 3], [0, 4], [0, 5]]] * 2))
    assert image.dtype == torch.float32
    for sample in range(2):
        for channel in range(2):
            low, high, shift, scale = rows[sample][channel]
            expected = (np.clip(raw[sample, channel].astype(np.float32), low, high) - shift) * scale
            # Three float32 operations on numbers below 256.
            np.testing.assert_allclose(image[sample, channel].numpy(), expected, rtol=0, atol=1e-4)
    assert valid.shape == (2, 1, 3, 4, 5)
    assert valid.all()


def test_the_stored_voxels_stay_as_they_are() -> None:
    raw = torch.full((1, 1, 2, 2, 2), 7.0)  # float32: a conversion that copies nothing would change it
    normalise(a_batch(raw, [[[0.0, 5.0, 1.0, 2.0]]], [[[0, 2]] * 3]))
    assert (raw == 7).all()


def test_voxels_outside_of_the_volume_are_not_valid_and_look_like_its_air() -> None:
    air = -1000
    raw = torch.full((1, 1, 4, 4, 6), air, dtype=torch.int16)
    raw[:, :, 1:3, :, 2:] = 40
    image, valid = normalise(a_batch(raw, [[[-500.0, 500.0, -500.0, 0.001]]], [[[1, 3], [0, 4], [2, 6]]]))
    expected = torch.zeros((4, 4, 6), dtype=torch.bool)
    expected[1:3, :, 2:] = True
    assert torch.equal(valid[0, 0], expected)
    assert torch.equal(image[0, 0][~expected], torch.zeros(int((~expected).sum())))
    assert torch.allclose(image[0, 0][expected], torch.tensor(0.54))


def test_valid_voxels_are_those_of_each_box() -> None:
    boxes = torch.tensor([[[0, 2], [1, 3], [0, 4]], [[2, 2], [0, 3], [0, 4]]])
    valid = valid_voxels(boxes, (2, 3, 4))
    assert valid.shape == (2, 1, 2, 3, 4)
    assert valid.sum(dim=(1, 2, 3, 4)).tolist() == [2 * 2 * 4, 0]


def test_a_batch_survives_pickling_and_moving() -> None:
    import pickle

    batch = a_batch(torch.zeros((1, 1, 2, 2, 2), dtype=torch.int16), [[[0.0, 1.0, 0.0, 1.0]]], [[[0, 2]] * 3])
    for copy in (pickle.loads(pickle.dumps(batch)), batch.to("cpu")):
        assert torch.equal(copy.volume, batch.volume)
        assert torch.equal(copy.normalisation, batch.normalisation)
        assert torch.equal(copy.inside, batch.inside)
        assert copy.label is None
        assert copy.volume_ids == batch.volume_ids
        assert copy.seeds == batch.seeds


def test_a_batch_on_the_device_keeps_its_sample_ids_where_the_trainer_reads_them() -> None:
    batch = a_batch(torch.zeros((1, 1, 2, 2, 2), dtype=torch.int16), [[[0.0, 1.0, 0.0, 1.0]]], [[[0, 2]] * 3])
    (moved,) = OnDevice(iter([batch]), torch.device("meta"))
    assert {tensor.device.type for tensor in moved.tensors().values()} == {"meta"}
    assert moved.volume.dtype == torch.int16, "voxels must travel as they are stored"
    assert moved.sample_ids is batch.sample_ids
    assert moved.volume_ids == batch.volume_ids


def test_errors_of_the_loader_reach_the_trainer_through_the_device() -> None:
    def failing() -> Iterator[Batch]:
        raise DataError("vol_003 cannot be read")
        yield

    with pytest.raises(DataError, match="vol_003 cannot be read"):
        next(OnDevice(failing(), torch.device("cpu")))


def test_labels_without_a_target_spacing_are_those_of_the_store() -> None:
    batch = a_batch(torch.zeros((1, 1, 2, 2, 2), dtype=torch.int16), [[[0.0, 1.0, 0.0, 1.0]]], [[[0, 2]] * 3])
    with pytest.raises(ValueError, match="read without labels"):
        labels(batch)
    label = torch.ones((1, 2, 2, 2), dtype=torch.uint8)
    assert labels(replace(batch, label=label)) is label
