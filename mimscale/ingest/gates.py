"""Quality gates: a volume that can be read may still be none that one wants to train on.

C channels | Z Y X volume, voxels
"""

from typing import Any

from numpy.typing import NDArray

from mimscale.ingest.config import GatesConfig
from mimscale.store.intensity import ChannelStats

# The warnings that a receipt may hold beside those of a format; scripts count them.
GATES = {
    "small_shape": "an edge has too few voxels",
    "small_field_of_view": "an edge is too short",
    "coarse_spacing": "a voxel edge is too long",
    "constant": "a channel holds one value only",
    "extreme_values": "a voxel lies implausibly far from 0",
    "wrong_modality": "the file says, or its values show, another modality than the recipe",
}
CT_HAS_AIR_BELOW_HU = -200.0  # air, lung or fat: no CT of a patient is without


def failed_gates(
    volume: NDArray[Any],
    spacing_mm: tuple[float, float, float],
    stats: tuple[ChannelStats, ...],
    modality: str,
    modality_in_file: str | None,
    gates: GatesConfig,
) -> dict[str, str]:
    """The gates that a scan [C, Z, Y, X] fails: warning -> detail."""
    shape = volume.shape[1:]
    edges_mm = [count * edge for count, edge in zip(shape, spacing_mm, strict=True)]
    low, high = float(volume.min()), float(volume.max())
    failed = {}
    if min(shape) < gates.min_shape_voxels:
        failed["small_shape"] = f"{' x '.join(map(str, shape))} voxels, gates.min_shape_voxels={gates.min_shape_voxels}"
    if min(edges_mm) < gates.min_field_of_view_mm:
        failed["small_field_of_view"] = (
            f"{min(edges_mm):.1f} mm, gates.min_field_of_view_mm={gates.min_field_of_view_mm}"
        )
    if max(spacing_mm) > gates.max_spacing_mm:
        failed["coarse_spacing"] = f"{max(spacing_mm):.2f} mm, gates.max_spacing_mm={gates.max_spacing_mm}"
    if any(channel.std == 0 for channel in stats):
        failed["constant"] = "one value only"
    if max(-low, high) > gates.max_abs_value:
        failed["extreme_values"] = f"{low:g} to {high:g}, gates.max_abs_value={gates.max_abs_value:g}"
    if {modality, modality_in_file} == {"ct", "mr"}:
        failed["wrong_modality"] = f"the file says {modality_in_file}, the recipe {modality}"
    elif modality == "ct" and low > CT_HAS_AIR_BELOW_HU:
        failed["wrong_modality"] = f"lowest value {low:g}: a CT in HU reaches below {CT_HAS_AIR_BELOW_HU:g}"
    return failed
