import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimscale.stream import order


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        # kat_vectors of Random123 1.14, lines "philox4x32 10".
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_known_answers(counter: list[int], key: list[int], words: list[int]) -> None:
    got = order.philox4x32(np.array(counter, dtype=np.uint32), np.array(key, dtype=np.uint32))
    assert got.tolist() == words


def test_draws_do_not_depend_on_what_else_is_drawn() -> None:
    together = order.draw(5, np.arange(100), order.ORIGIN)
    alone = np.concatenate([order.draw(5, np.array([i]), order.ORIGIN) for i in range(100)])
    assert np.array_equal(together, alone)
    with_own_seeds = order.draw(np.array([5, 6], dtype=np.uint64), 3, order.ORIGIN)
    assert np.array_equal(with_own_seeds[1], order.draw(6, 3, order.ORIGIN))


def test_purpose_attempt_index_and_both_halves_of_the_seed_change_a_draw() -> None:
    draws = [
        order.draw(1, 0, order.ORIGIN),
        order.draw(1 + 2**32, 0, order.ORIGIN),
        order.draw(1, 1, order.ORIGIN),
        order.draw(1, 2**32, order.ORIGIN),
        order.draw(1, 0, order.SUBSTITUTE),
        order.draw(1, 0, order.ORIGIN, attempt=1),
    ]
    assert len({tuple(words.tolist()) for words in draws}) == len(draws)


def test_the_values_of_a_seed_never_change() -> None:
    # Golden: a saved position means other samples when one of these numbers changes. Raise plan.ORDER_VERSION then.
    assert order.draw(1, np.array([0, 1]), order.ORIGIN).tolist() == [
        [310111809, 503608456, 1216621344, 171521174],
        [281831268, 2841856516, 1158065745, 4049477459],
    ]
    assert int(order.draw_seeds(7, 5, order.SAMPLE_SEED)) == 145924499724777633
    assert order.draw_seeds(2**64 - 1, np.arange(2), order.SAMPLE_SEED).tolist() == [
        4127586797844641354,
        12252896810770985686,
    ]
    assert order.permuted(np.arange(10), 10, seed=1, epoch=0).tolist() == [4, 3, 0, 6, 7, 5, 1, 8, 9, 2]


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_a_permutation_holds_every_number_once(size: int, seed: int, epoch: int) -> None:
    values = order.permuted(np.arange(size), size, seed, epoch)
    assert np.array_equal(np.sort(values), np.arange(size))


@given(size=st.integers(1, 10**12), seed=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_a_permutation_needs_no_more_than_the_indices_asked_for(size: int, seed: int) -> None:
    index = np.unique(np.linspace(0, size - 1, 50, dtype=np.int64))
    values = order.permuted(index, size, seed, epoch=3)
    assert len(np.unique(values)) == len(index)
    assert values.min() >= 0
    assert values.max() < size


@pytest.mark.parametrize("size", [2, 3, 5, 7, 16])
def test_every_number_is_equally_likely_at_every_place(size: int) -> None:
    epochs = 500
    counts = np.zeros((size, size))
    for epoch in range(epochs):
        counts[np.arange(size), order.permuted(np.arange(size), size, 11, epoch)] += 1
    expected = epochs / size
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = (size - 1) ** 2
    # The seeds are fixed, so this cannot flicker; five standard deviations of the chi-square distribution.
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


def test_epochs_and_seeds_give_unrelated_permutations() -> None:
    first = order.permuted(np.arange(1000), 1000, seed=1, epoch=0)
    for seed, epoch in ((1, 1), (2, 0)):
        other = order.permuted(np.arange(1000), 1000, seed, epoch)
        assert np.count_nonzero(first == other) < 10
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.1


def test_an_index_outside_of_the_permutation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"index in \[-1, 10\] is outside of \[0, 10\)"):
        order.permuted(np.array([-1, 10]), 10, seed=0, epoch=0)


def test_below_reaches_both_ends_and_nothing_beyond() -> None:
    words = np.array([0, 2**31, 2**32 - 1], dtype=np.uint32)
    assert order.below(words, 1).tolist() == [0, 0, 0]
    assert order.below(words, 10).tolist() == [0, 5, 9]
    assert order.below(words, np.array([2, 4, 8])).tolist() == [0, 2, 7]
