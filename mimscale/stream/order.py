"""Random numbers and permutations that belong to an index, not to a process.

Everything is an integer function of (seed, index) in NumPy integer arithmetic alone, so that it gives the same values
with every NumPy release, rank count and worker count. NumPy's own `Generator` methods promise no such thing.
"""

import math
from functools import lru_cache

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
_PHILOX_ROUNDS = 10
_PHILOX_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], dtype=np.uint64)
_PHILOX_KEY_STEPS = np.arange(_PHILOX_ROUNDS, dtype=np.uint64)[:, None] * np.array([0x9E3779B9, 0xBB67AE85], np.uint64)
_FEISTEL_ROUNDS = 8


def philox4x32(counter: NDArray[np.uint32], key: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Philox4x32-10: counter [..., 4], key [..., 2] -> words [..., 4]; the leading dimensions broadcast.

    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", doi:10.1145/2063384.2063405.
    """
    # Words 0 and 2 go through the same steps, and so do 1 and 3: for a few samples the calls count, not the numbers.
    even, odd = counter[..., 0::2].astype(np.uint64), counter[..., 1::2].astype(np.uint64)
    for step in _PHILOX_KEY_STEPS:
        product = even * _PHILOX_MULTIPLIERS  # 32 x 32 bits: fits in 64
        even = (product >> _SHIFT_32)[..., ::-1] ^ odd ^ ((key + step) & _LOW_32)
        odd = (product & _LOW_32)[..., ::-1]
    words = np.empty((*even.shape[:-1], 4), dtype=np.uint32)
    words[..., 0::2], words[..., 1::2] = even, odd
    return words


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


@lru_cache(maxsize=64)  # of an epoch: the same for every sample of it
def _round_keys(seed: int, epoch: int) -> NDArray[np.uint64]:
    keys = draw_seeds(seed, np.arange(_FEISTEL_ROUNDS) + epoch * _FEISTEL_ROUNDS, PERMUTATION)
    keys.flags.writeable = False
    return keys


def _mixed(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    # The finaliser of SplitMix64: every input bit reaches every output bit (Steele et al. 2014,
    # doi:10.1145/2660193.2660195).
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _as_uint64(value: ArrayLike) -> NDArray[np.uint64]:
    array = np.asarray(value)
    return np.asarray(array, dtype=np.uint64) if array.dtype != np.int64 else array.view(np.uint64)
