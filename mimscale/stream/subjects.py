"""Which subjects train and which validate, where a config asks for other than the store's own split.

Subjects have one order that follows from their ids alone. A fraction takes the first of them, so fractions are nested,
and all volumes of a subject stay together.

N volumes
"""

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

from mimscale.store.manifest import Manifest
from mimscale.stream.config import StreamConfig, fold_share


def places(subjects: NDArray[np.object_]) -> NDArray[np.int64]:
    """The place of each volume's subject in the order of all subjects, from 0: [N] -> [N]."""
    unique, inverse = np.unique(subjects.astype(str), return_inverse=True)
    digests = [hashlib.sha256(f"order of subjects: {subject}".encode()).digest() for subject in unique]
    place = np.empty(len(unique), dtype=np.int64)
    place[sorted(range(len(unique)), key=digests.__getitem__)] = np.arange(len(unique))
    return place[inverse]


def in_split(manifest: Manifest, split: str, config: StreamConfig) -> NDArray[np.bool_]:
    """Which volumes are of a split (train or val): [N]. Folds need the column `subject`, else `split` will do."""
    if config.fold is None:
        return manifest.equal(split=split)
    fold, folds = fold_share(config.fold)
    validates = places(manifest.column("subject")) % folds == fold
    chosen: NDArray[np.bool_] = validates if split == "val" else ~validates
    return chosen


def first_subjects(manifest: Manifest, indices: NDArray[np.int64], fraction: float) -> NDArray[np.int64]:
    """Of these rows those of the first subjects: `fraction` of the subjects, rounded up."""
    if fraction == 1:
        return indices
    place = places(manifest.column("subject")[indices])
    wanted = math.ceil(fraction * (int(place.max(initial=-1)) + 1))
    return indices[place < wanted]
