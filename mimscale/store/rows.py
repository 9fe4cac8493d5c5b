"""What a store says of each of its volumes, and the same as columns of the manifest, rows of it and JSON of a receipt.

C channels | Z Y X volume, voxels
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from mimscale.store.intensity import ChannelStats

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class OverlayRow:
    """Where the overlay of one volume lies. Its voxels are uint8, [1, Z, Y, X], on the grid of the stored volume."""

    part: int
    offset_bytes: int  # of the shard inside the pack
    length_bytes: int
    sha256: str  # of the shard
    source_sha256: str
    class_voxels: tuple[int, ...]  # voxels of class 0, 1, ...
    source_zyx: tuple[int, int, int] | None = None  # its shape when it lies on the source's grid, turned to RAS+
    class_chunks: dict[str, str] = field(default_factory=dict)  # in receipts only: see `chunk_maps`


@dataclass(frozen=True, kw_only=True)
class VolumeRow:
    """One volume of a store."""

    id: str  # 16 hex digits, of source_sha256 and of the config that decides its voxels
    subject: str  # keyed hash; the key lies outside the store
    dataset: str
    licence: str
    modality: str
    split: str  # train or val
    shape: tuple[int, int, int, int]  # [C, Z, Y, X], voxels
    spacing_mm: tuple[float, float, float]  # [Z, Y, X]
    affine: tuple[float, ...]  # 16 numbers, row by row: voxel (x, y, z, 1) -> world (RAS+, mm)
    dtype: str  # int16, uint8, uint16 or float32
    part: int
    offset_bytes: int  # of the shard inside the pack
    length_bytes: int
    fill_value: float  # the volume's air, in stored units; also what lies outside it
    sha256: str  # of the shard
    voxels_sha256: str  # of shape, affine and voxels: two sources with the same are one scan
    source_sha256: str
    source_orientation: str  # axis codes of the source, for example LPS
    source_affine: tuple[float, ...]
    source_shape: tuple[int, int, int]  # (x, y, z) of the source file
    stats: tuple[ChannelStats, ...]  # one a channel
    foreground_box: Box  # zyx start and stop of all that is no air
    overlays: dict[str, OverlayRow]
    tags: dict[str, str] = field(default_factory=dict)  # what the list of sources says besides, to filter by
    acquisition: dict[str, str] = field(default_factory=dict)  # how it was taken: header fields that name nobody
    warnings: tuple[str, ...] = ()  # what the quality gates found
    crop_box: Box | None = None  # zyx start and stop, in the source grid turned to RAS+, of what is stored; None: all
    resampled: bool = False  # its voxels are not those of the source
    occupied_chunks: str = ""  # in receipts only: see `chunk_maps`

    @property
    def source_zyx(self) -> tuple[int, int, int]:
        """Shape of the source turned to RAS+, voxels."""
        edge_of = dict(zip(self.source_orientation, self.source_shape, strict=True))
        z, y, x = (next(edge_of[code] for code in codes if code in edge_of) for codes in ("SI", "AP", "RL"))
        return (z, y, x)


@dataclass(frozen=True, kw_only=True)
class SampleRow:
    """What it takes to read crops of a volume and to normalise them: a small part of its row. See `VolumeRow`."""

    id: str
    subject: str
    shape: tuple[int, int, int, int]
    spacing_mm: tuple[float, float, float]
    dtype: str
    part: int
    offset_bytes: int
    length_bytes: int
    fill_value: float
    stats: tuple[ChannelStats, ...]
    overlays: dict[str, OverlayRow]


_STATS = pa.struct([(item.name, pa.float64()) for item in dataclasses.fields(ChannelStats)])
_OVERLAY = pa.struct(
    [
        ("name", pa.string()),
        ("part", pa.int32()),
        ("offset_bytes", pa.int64()),
        ("length_bytes", pa.int64()),
        ("sha256", pa.string()),
        ("source_sha256", pa.string()),
        ("class_voxels", pa.list_(pa.int64())),
        ("source_zyx", pa.list_(pa.int32())),
    ]
)
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("subject", pa.string()),
        ("dataset", pa.string()),
        ("licence", pa.string()),
        ("modality", pa.string()),
        ("split", pa.string()),
        ("shape", pa.list_(pa.int32(), 4)),
        ("spacing_mm", pa.list_(pa.float64(), 3)),
        ("affine", pa.list_(pa.float64(), 16)),
        ("dtype", pa.string()),
        ("part", pa.int32()),
        ("offset_bytes", pa.int64()),
        ("length_bytes", pa.int64()),
        ("fill_value", pa.float64()),
        ("sha256", pa.string()),
        ("voxels_sha256", pa.string()),
        ("source_sha256", pa.string()),
        ("source_orientation", pa.string()),
        ("source_affine", pa.list_(pa.float64(), 16)),
        ("source_shape", pa.list_(pa.int32(), 3)),
        ("stats", pa.list_(_STATS)),
        ("foreground_box", pa.list_(pa.int32(), 6)),
        ("overlays", pa.list_(_OVERLAY)),
        ("tags", pa.map_(pa.string(), pa.string())),
        ("acquisition", pa.map_(pa.string(), pa.string())),
        ("warnings", pa.list_(pa.string())),
        ("crop_box", pa.list_(pa.int32(), 6)),
        ("resampled", pa.bool_()),
    ]
)
_MAPS = ("tags", "acquisition")  # columns of key and value


def table_tree(row: VolumeRow) -> dict[str, Any]:
    """As `row_tree`, but lists of pairs instead of dicts, and no deep copies: a merge writes every row of a store."""
    return {
        **vars(row),
        **{name: sorted(getattr(row, name).items()) for name in _MAPS},
        "stats": [vars(channel) for channel in row.stats],
        "overlays": [{"name": name, **vars(place)} for name, place in sorted(row.overlays.items())],
        "foreground_box": _flat(row.foreground_box),
        "crop_box": None if row.crop_box is None else _flat(row.crop_box),
    }


def row_tree(row: VolumeRow) -> dict[str, Any]:
    """A row as plain lists, numbers and text; a box is six numbers."""
    tree = dataclasses.asdict(row)
    tree["foreground_box"] = _flat(row.foreground_box)
    tree["crop_box"] = None if row.crop_box is None else _flat(row.crop_box)
    return tree


def row_of_receipt(tree: dict[str, Any]) -> VolumeRow:
    """The row that `row_tree` made into JSON."""
    overlays = [{"name": name, **overlay} for name, overlay in tree["overlays"].items()]
    return row_of_tree({**tree, "overlays": overlays})


def overlay_of_receipt(tree: dict[str, Any]) -> OverlayRow:
    """The overlay that `dataclasses.asdict` made into JSON."""
    plain: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in tree.items()}
    return OverlayRow(**plain)


def row_of_tree(tree: dict[str, Any]) -> VolumeRow:
    """The row that `table_tree` made into a row of the manifest."""
    plain: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in tree.items()}
    plain |= {
        "stats": tuple(ChannelStats(**channel) for channel in tree["stats"]),
        "foreground_box": _box(tree["foreground_box"]),
        "crop_box": None if tree["crop_box"] is None else _box(tree["crop_box"]),
        "overlays": overlay_rows(tree["overlays"]),
        **{name: dict(tree[name]) for name in _MAPS},
    }
    return VolumeRow(**plain)


def overlay_rows(entries: list[dict[str, Any]]) -> dict[str, OverlayRow]:
    """The overlays of a volume by their names."""
    overlays = {}
    for entry in entries:
        fields = {name: value for name, value in entry.items() if name != "name"}
        overlays[entry["name"]] = overlay_of_receipt(fields)
    return overlays


def _flat(box: Box) -> list[int]:
    return [edge for axis in box for edge in axis]


def _box(flat: Sequence[int]) -> Box:
    z0, z1, y0, y1, x0, x1 = flat
    return ((z0, z1), (y0, y1), (x0, x1))
