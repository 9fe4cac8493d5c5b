"""Where windows lie: they cover what they must, and depend on nothing that they should not."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimscale.evaluate.windows import covered_box, drawn_origins, sliding_origins

EDGE = st.integers(1, 40)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(EDGE, EDGE, st.integers(0, 40), st.integers(0, 40)), min_size=3, max_size=3),
    st.sampled_from([0.0, 0.25, 0.5, 0.9]),
)
def test_windows_lie_in_the_volume_and_cover_the_box(axes, overlap):
    crop = [min(a, b) for a, b, _, _ in axes]
    size = [max(a, b) for a, b, _, _ in axes]
    box = [tuple(sorted((min(c, edge), min(d, edge)))) for (_, _, c, d), edge in zip(axes, size, strict=True)]
    start, stop = covered_box(box, size, crop)
    origins = np.array(sliding_origins(start, stop, crop, overlap))
    assert (origins >= 0).all()
    assert (origins + crop <= size).all()
    wanted = box if all(low < high for low, high in box) else [(0, edge) for edge in size]
    for axis, (low, high) in enumerate(wanted):
        covered = {voxel for at in set(origins[:, axis].tolist()) for voxel in range(at, at + crop[axis])}
        assert covered >= set(range(low, high))
    assert len(set(map(tuple, origins.tolist()))) == len(origins)


def test_windows_without_overlap_stand_side_by_side_and_the_last_ends_with_the_box():
    assert sliding_origins((0, 0, 0), (32, 16, 20), (16, 16, 16), 0.0) == [
        (0, 0, 0),
        (0, 0, 4),
        (16, 0, 0),
        (16, 0, 4),
    ]


def test_a_volume_smaller_than_a_window_is_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match="smaller than a window"):
        covered_box([(0, 8)] * 3, (8, 8, 8), (16, 8, 8))


def test_drawn_windows_belong_to_the_volume_and_the_seed():
    def drawn(volume_id, seed, count=50):
        return drawn_origins((2, 0, 5), (40, 16, 30), (16, 16, 16), count=count, volume_id=volume_id, seed=seed)

    assert drawn("a", 1) == drawn("a", 1)
    assert drawn("a", 1)[:7] == drawn("a", 1, count=7)
    assert drawn("a", 1) != drawn("b", 1)
    assert drawn("a", 1) != drawn("a", 2)
    z, y, x = zip(*drawn("a", 1), strict=True)
    assert min(z) >= 2
    assert max(z) <= 24
    assert set(y) == {0}
    assert min(x) >= 5
    assert max(x) <= 14
