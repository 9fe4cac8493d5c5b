"""Random numbers and permutations that belong to an index, not to a process.

Everything is an integer function of (seed, index) in NumPy integer arithmetic alone, so that it gives the same values
with every NumPy release, rank count and worker count. NumPy's own `Generator` methods promise no such thing.
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

# What a number is drawn for. One value for each use keeps draws for the same index independent. Never renumber.
ORIGIN = 1
SAMPLE_SEED = 2
SUBSTITUTE = 3
PERMUTATION = 4
BATCH_SEED = 5
MASK = 6
AUGMENTATION = 7
KIND = 8
REGION = 9
CHUNK = 10
VIEW = 11

_LOW_32 = np.uint64(0xFFFFFFFF)
_SHIFT_32 = np.uint64(32)
_PHILOX_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_PHILOX_KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_PHILOX_ROUNDS = 10
_FEISTEL_ROUNDS = 8


def philox4x32(counter: NDArray[np.uint32], key: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Philox4x32-10: counter [..., 4], key [..., 2] -> words [..., 4]; the leading dimensions broadcast.

    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", doi:10.1145/2063384.2063405.
    """
    x0, x1, x2, x3 = (np.atleast_1d(counter[..., i]).astype(np.uint64) for i in range(4))
    key0, key1 = (np.atleast_1d(key[..., i]).astype(np.uint64) for i in range(2))
    for _ in range(_PHILOX_ROUNDS):
        product0 = x0 * _PHILOX_MULTIPLIERS[0]  # 32 x 32 bits: fits in 64
        product1 = x2 * _PHILOX_MULTIPLIERS[1]
        x0, x1, x2, x3 = (
            (product1 >> _SHIFT_32) ^ x1 ^ key0,
            product1 & _LOW_32,
            (product0 >> _SHIFT_32) ^ x3 ^ key1,
            product0 & _LOW_32,
        )
        key0 = (key0 + _PHILOX_KEY_STEPS[0]) & _LOW_32
        key1 = (key1 + _PHILOX_KEY_STEPS[1]) & _LOW_32
    words = np.stack(np.broadcast_arrays(x0, x1, x2, x3), axis=-1).astype(np.uint32)
    return words.reshape((*np.broadcast_shapes(counter.shape[:-1], key.shape[:-1]), 4))


def draw(seed: ArrayLike, index: ArrayLike, purpose: int, attempt: int = 0) -> NDArray[np.uint32]:
    """Four random words for each (seed, index): [..., 4] uint32, shape broadcast from the two.

    Args:
        seed: 64-bit key; a number, or an array when each element has a seed of its own.
        index: 64-bit counter, for example the global sample index.
        purpose: one of this module's constants.
        attempt: another independent draw for the same index, below 2**32.
    """
    seeds, indices = _as_uint64(seed), _as_uint64(index)
    key = np.stack([seeds & _LOW_32, seeds >> _SHIFT_32], axis=-1).astype(np.uint32)
    low, high = indices & _LOW_32, indices >> _SHIFT_32
    counter = np.stack([low, high, np.full_like(low, attempt), np.full_like(low, purpose)], axis=-1).astype(np.uint32)
    return philox4x32(counter, key)


def draw_seeds(seed: ArrayLike, index: ArrayLike, purpose: int) -> NDArray[np.uint64]:
    """One random 64-bit number for each (seed, index), fit to be the seed of further draws."""
    words = draw(seed, index, purpose).astype(np.uint64)
    return np.asarray(words[..., 0] | (words[..., 1] << _SHIFT_32), dtype=np.uint64)


def below(words: NDArray[np.uint32], bound: ArrayLike) -> NDArray[np.int64]:
    """Map random words to integers in [0, bound), elementwise; `bound` is at least 1 and far below 2**32."""
    product = words.astype(np.uint64) * _as_uint64(bound)  # the high half of the product is the scaled word
    return np.asarray(product >> _SHIFT_32, dtype=np.int64)


def permuted(index: NDArray[np.int64], size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Where a random permutation of [0, size) keyed by (seed, epoch) sends each `index` [n], in O(n) memory.

    A Feistel network over a grid of rows x columns that just covers `size`; values beyond `size` walk on until
    they come back (Black & Rogaway 2002, "Ciphers with arbitrary finite domains").

    Raises:
        ValueError: an index is outside [0, size).
    """
    if index.size and (index.min() < 0 or index.max() >= size):
        raise ValueError(f"index in [{index.min()}, {index.max()}] is outside of [0, {size})")
    rows = math.isqrt(max(size, 1) - 1) + 1 if size > 1 else 1
    columns = -(-size // rows)
    keys = _round_keys(seed, epoch)
    value = index.astype(np.uint64)
    outside = np.ones(value.shape, dtype=bool)
    while outside.any():
        value[outside] = _feistel(value[outside], np.uint64(rows), np.uint64(columns), keys)
        outside &= value >= np.uint64(size)
    return value.astype(np.int64)


def _feistel(
    value: NDArray[np.uint64], rows: np.uint64, columns: np.uint64, keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    row, column = value // columns, value % columns
    for number, key in enumerate(keys):
        if number % 2 == 0:
            row = (row + _mixed(column ^ key) % rows) % rows
        else:
            column = (column + _mixed(row ^ key) % columns) % columns
    return row * columns + column


def _round_keys(seed: int, epoch: int) -> NDArray[np.uint64]:
    return draw_seeds(seed, np.arange(_FEISTEL_ROUNDS) + epoch * _FEISTEL_ROUNDS, PERMUTATION)


def _mixed(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    # The finaliser of SplitMix64: every input bit reaches every output bit (Steele et al. 2014,
    # doi:10.1145/2660193.2660195).
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _as_uint64(value: ArrayLike) -> NDArray[np.uint64]:
    array = np.asarray(value)
    return np.asarray(array, dtype=np.uint64) if array.dtype != np.int64 else array.view(np.uint64)
