"""The config of `mimscale ingest`."""

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from mimscale.config import require_positive
from mimscale.store import layout
from mimscale.store.intensity import IntensityContract


@dataclass(frozen=True, kw_only=True)
class ImageLabel:
    """One image with its label map."""

    image: str | tuple[str, ...]  # path of the volume, or of each channel
    label: str | None = None  # path of its label map


@dataclass(frozen=True, kw_only=True)
class ImageLabelGlobs:
    """Many images with label maps of the same file names."""

    images: str  # glob of the volumes
    labels: str  # glob of the label maps


@dataclass(frozen=True, kw_only=True)
class GatesConfig:
    """What a volume must be like; each gate that it fails becomes a typed warning in its receipt and its row."""

    action: Literal["report", "quarantine"] = "report"  # quarantine: a volume that fails a gate is not stored
    min_shape_voxels: int = 16  # warning `small_shape`: an edge has fewer voxels
    min_field_of_view_mm: float = 40.0  # `small_field_of_view`: an edge is shorter
    max_spacing_mm: float = 8.0  # `coarse_spacing`: a voxel has a longer edge
    max_abs_value: float = 1e6  # `extreme_values`: a voxel lies further from 0

    def __post_init__(self) -> None:
        require_positive(
            "gates",
            min_shape_voxels=self.min_shape_voxels,
            min_field_of_view_mm=self.min_field_of_view_mm,
            max_spacing_mm=self.max_spacing_mm,
            max_abs_value=self.max_abs_value,
        )


Sources = str | ImageLabelGlobs | list[str | ImageLabel | ImageLabelGlobs]


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """Volumes -> store."""

    sources: Sources  # glob, folder, dataset.json, table, {images: GLOB, labels: GLOB}, or a list of these and of pairs
    out: str  # the store to write or to finish
    dataset: str = "unnamed"  # kept in every row, so that merged stores can be told apart
    licence: str = "unknown"  # what the volumes may be used for; kept in every row
    modality: Literal["ct", "mr", "other"] = "other"  # ct: air is -1024, tissue begins at -500, below -1500 is padding
    intensity: IntensityContract = field(default_factory=IntensityContract)  # how readers normalise; voxels stay as is
    channels: int = 1  # channels of each source; above 1 the source's fourth axis must have this length
    class_names: tuple[str, ...] = ()  # name of label value 0, 1, ...; a dataset.json may give them instead
    overlay: str = "label"  # name under which the label maps are stored; another one adds to volumes that are there
    class_map: dict[int, int] = field(default_factory=dict)  # value in the label files -> value in the store
    spacing_mm: float | tuple[float, ...] | None = None  # resample to voxels of this edge or of [z, y, x]; null: keep
    crop: Literal["none", "foreground"] = "none"  # foreground: store only the box of what is no air, and a margin
    crop_margin_mm: float = 10.0  # at least this much around the foreground
    chunk_voxels: int = 32  # edge of the smallest readable cube; about a third of the crop edge
    codec: Literal["zstd", "fast"] = "zstd"  # fast (lz4hc): decodes 5 times as fast, about 25 % bigger
    part_bytes: int = 2 * 2**30  # source bytes that go into one pack; a part is the unit of work and of restart
    parts: int | None = None  # number of packs, instead of part_bytes
    val_fraction: float = 0.1  # share of subjects held out for validation; 0 keeps all for training
    split_seed: int = 0  # which subjects are held out
    subject_pattern: str = r"(sub-[A-Za-z0-9]+)|(.+)"  # first group that matches the file's stem names the subject
    channel_names: tuple[str, ...] = ()  # columns, or words in names (BIDS, BraTS), that become channels, in this order
    bids_labels: str = "derivatives/*_dseg.nii*"  # which files of a BIDS folder are its label maps
    keep_columns: tuple[str, ...] = ()  # columns of a table to keep although their names hint at people or dates
    labelled_only: bool = False  # leave out volumes without a label map, as a Decathlon's `test` has them
    allow_outside: bool = False  # let a table or a link name files outside its own folder; for lists that you trust
    subject_key: str | None = None  # file with the secret that hides subject names; null: OUT.subject_key
    assume_orientation: bool = False  # accept NIfTI files whose qform and sform codes are both 0
    label_tolerance_voxels: float = 0.1  # how far a label's grid may lie from its image's
    gates: GatesConfig = field(default_factory=GatesConfig)  # besides what makes a file unusable
    max_quarantined: int | None = None  # exit 3 when more sources than this are unusable; null: only when all are
    workers: int = 2  # processes that convert; changes no byte of the store
    task: str | None = None  # "3/64": convert the parts of array task 3 of 0 to 63, and build no manifest
    merge: bool = False  # convert nothing: build the manifest from the receipts of all tasks
    remove: str | None = None  # withdraw this subject: name as in the sources, or its hidden name in the manifest

    def __post_init__(self) -> None:
        require_positive(
            "ingest",
            channels=self.channels,
            chunk_voxels=self.chunk_voxels,
            part_bytes=self.part_bytes,
            workers=self.workers,
            label_tolerance_voxels=self.label_tolerance_voxels,
        )
        if self.parts is not None:
            require_positive("ingest", parts=self.parts)
        if isinstance(self.spacing_mm, tuple) and len(self.spacing_mm) != 3:
            raise ValueError(f"spacing_mm={list(self.spacing_mm)}: give one number for all axes, or three: [z, y, x]")
        if not all(0 < edge < math.inf for edge in self.spacing_zyx_mm or ()):
            raise ValueError(f"spacing_mm={self.spacing_mm}: a voxel edge must be above 0 mm")
        if not 0 <= self.crop_margin_mm < math.inf:
            raise ValueError(f"crop_margin_mm={self.crop_margin_mm}: must be at least 0")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction={self.val_fraction}: must be at least 0 and below 1")
        if not layout.is_plain_name(self.overlay):
            raise ValueError(f"overlay={self.overlay!r}: becomes a folder name; use letters, digits, '_', '-' and '.'")
        if self.overlay != layout.stored_overlay(self.overlay):
            raise ValueError(
                f"overlay={self.overlay}: names that end with {layout.ON_SOURCE_GRID!r} are for labels on the grid of "
                "their source, which an ingest that crops or resamples makes by itself; choose another"
            )
        if self.task is not None:
            task_share(self.task)
        if sum((self.task is not None, self.merge, self.remove is not None)) > 1:
            raise ValueError("task, merge and remove: give one of them, they are different steps")
        for old, new in self.class_map.items():
            if not 0 <= new <= 255:
                raise ValueError(f"class_map.{old}={new}: a stored label is a number from 0 to 255")
        if len(self.class_names) > 255:
            raise ValueError(f"class_names: {len(self.class_names)} names, at most 255 fit beside the ignore value 255")
        try:
            groups = re.compile(self.subject_pattern).groups
        except re.error as error:
            raise ValueError(f"subject_pattern={self.subject_pattern!r}: {error}") from None
        if groups == 0:
            raise ValueError(f"subject_pattern={self.subject_pattern!r}: needs a (group) that holds the subject's name")
        if len(set(self.channel_names)) < len(self.channel_names):
            raise ValueError(f"channel_names={list(self.channel_names)}: lists a name twice")

    @property
    def spacing_zyx_mm(self) -> tuple[float, float, float] | None:
        """`spacing_mm` of each axis."""
        if self.spacing_mm is None:
            return None
        z, y, x = self.spacing_mm if isinstance(self.spacing_mm, tuple) else (self.spacing_mm,) * 3
        return (z, y, x)

    @property
    def keeps_grid(self) -> bool:
        """True when every volume is stored on the grid of its source."""
        return self.spacing_mm is None and self.crop == "none"


# Changes no voxel and no row: may differ when an ingest is continued.
OUTSIDE_HASH = ("sources", "out", "workers", "subject_key", "max_quarantined", "task", "merge", "remove")
# The same for every volume of a store. All other keys may differ when sources are added later.
STORE_KEYS = (
    "chunk_voxels",
    "codec",
    "intensity",
    "val_fraction",
    "split_seed",
    "spacing_mm",
    "crop",
    "crop_margin_mm",
)


def task_share(task: str) -> tuple[int, int]:
    """`3/64` -> (3, 64): the fourth of 64 array tasks.

    Raises:
        ValueError: not of this form, or a number out of range.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", task)
    if match is None or not int(match[1]) < int(match[2]):
        raise ValueError(f"task={task}: expected I/N with I from 0 to N-1, for example task=$SLURM_ARRAY_TASK_ID/64")
    return int(match[1]), int(match[2])


@dataclass(frozen=True, kw_only=True)
class CohortConfig:
    """One real labelled volume -> itself and derived subjects of it."""

    out: str  # folder for imagesTr/, labelsTr/, dataset.json and cohort.json
    subjects: int = 8  # derived subjects beside the real one
    seed: int = 0  # a subject depends on seed and its number only
    validation: int | None = None  # the real one and this many derived subjects are for validation; null: not fixed
    image: str | None = None  # real volume (.nii, .nii.gz); null: MNI152 2009a T1, 1 mm, which nilearn ships
    label: str | None = None  # its label map, on the same grid
    class_names: tuple[str, ...] = ()  # of the label's values 0, 1, ...; default: tissues of MNI152, else class_N
    spacing_mm: float | None = None  # resample the real volume to cubic voxels of this edge first; null: as it is
    workers: int = 2  # processes

    def __post_init__(self) -> None:
        require_positive("cohort", workers=self.workers)
        if self.subjects < 0:
            raise ValueError(f"subjects={self.subjects}: must be at least 0")
        if self.validation is not None and not 0 <= self.validation <= self.subjects:
            raise ValueError(f"validation={self.validation}: must be from 0 to subjects={self.subjects}")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: must be at least 0")
        if self.spacing_mm is not None:
            require_positive("cohort", spacing_mm=self.spacing_mm)
        if (self.image is None) != (self.label is None):
            raise ValueError("image and label: give both, or neither for MNI152")
