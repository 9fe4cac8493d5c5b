"""What validation asks of a volume beside its voxels: the modality, and where air ends.

B samples | C channels
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from mimscale.store.intensity import IntensityContract, normalisation
from mimscale.store.manifest import Manifest
from mimscale.store.rows import SampleRow
from mimscale.stream.batch import Batch


class VolumeFacts:
    """Modality and foreground threshold of some volumes.

    Args:
        manifest: of the store, with its training columns.
        indices: rows of these volumes.
        contract: how the store's voxels are normalised.
    """

    def __init__(self, manifest: Manifest, indices: NDArray[np.int64], contract: IntensityContract) -> None:
        modalities = manifest.column("modality")
        rows = [(manifest.sample_row(int(index)), str(modalities[index])) for index in indices]
        self._modality = {row.id: modality.lower() for row, modality in rows}
        self._threshold = {row.id: foreground_threshold(row, contract) for row, _ in rows}

    def added(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, each with the modalities and thresholds of its samples."""
        for batch in batches:
            thresholds = np.stack([self._threshold[volume_id] for volume_id in batch.volume_ids])
            yield replace(
                batch,
                modalities=tuple(self._modality[volume_id] for volume_id in batch.volume_ids),
                foreground_above=torch.from_numpy(thresholds),
            )


def foreground_threshold(row: SampleRow, contract: IntensityContract) -> NDArray[np.float32]:
    """The normalised intensity above which a voxel of a volume is foreground: float32 [C].

    Half way between the volume's air and the mean of its foreground: for CT about -500 HU, for MR near Otsu's
    threshold, from which ingest has that mean. Where the contract clips higher than that, what is clipped is no
    foreground.
    """
    low, _, shift, scale = normalisation(contract, row.stats).T  # each [C]
    body = np.asarray([channel.foreground_mean for channel in row.stats])
    between = (row.fill_value + body) / 2
    threshold: NDArray[np.float32] = ((np.maximum(between, low) - shift) * scale).astype(np.float32)
    return threshold
