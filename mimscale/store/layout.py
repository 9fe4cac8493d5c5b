"""Where everything in a store lies, and `store.json`, which says how to read it.

store/store.json
store/manifest.parquet                       written last
store/chunk_maps-<hash>.arrow                named by the manifest: which chunks hold foreground and each class
store/packs/part-00042.zarr.zip
store/overlays/<name>/part-00042.zarr.zip
store/receipts/part-00042.jsonl
"""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mimscale import durable
from mimscale.config import build_config
from mimscale.errors import ConfigError, DataError
from mimscale.store import files
from mimscale.store.intensity import IntensityContract

FORMAT_VERSION = 2
CHUNK_MAPS_GLOB = "chunk_maps-*.arrow"
IGNORE_VALUE = 255  # an overlay voxel that no loss and no score may count
ON_SOURCE_GRID = "_source"  # ends the name of an overlay's twin: the same labels on the grid of the source
# Blosc settings that the own encoder writes and the own reader decodes: name -> (compressor, level). The shuffle is
# chosen for each volume; its `zarr.json` and Blosc's own header name it. LZ4HC is LZ4 with a search for longer matches:
# slower to write, and a third faster to read.
CODECS = {"zstd": ("zstd", 3), "fast": ("lz4hc", 5)}


@dataclass(frozen=True, kw_only=True)
class OverlayInfo:
    """What the numbers of an overlay mean."""

    class_names: tuple[str, ...]  # name of voxel value 0, 1, ...
    ignore_value: int = IGNORE_VALUE


@dataclass(frozen=True, kw_only=True)
class StoreInfo:
    """The content of `store.json`."""

    format_version: int = FORMAT_VERSION
    axes: str = "czyx"
    chunk_voxels: int  # edge of an inner chunk along Z, Y and X; along C it is 1
    codec: str  # a key of CODECS; the reader leaves any other to zarr-python
    intensity: IntensityContract
    modality: str
    num_parts: int  # the number of the next part
    ingest: dict[str, Any]  # the keys of the ingest config that are the same for every volume
    ingest_hash: str  # of `ingest`
    subject_key_fingerprint: str  # of the key that lies outside the store
    overlays: dict[str, OverlayInfo] = field(default_factory=dict)
    withdrawn: tuple[str, ...] = ()  # hidden names of subjects that must not come back
    rewritten_parts: dict[int, int] = field(default_factory=dict)  # part -> its successor, while a removal is going on
    removed_parts: tuple[int, ...] = ()  # parts whose successor has taken their place

    @property
    def stored_as(self) -> dict[str, Any]:
        """What of a source is stored, and on what grid: it goes into the contract of weights too."""
        return {key: self.ingest[key] for key in ("spacing_mm", "crop", "crop_margin_mm") if key in self.ingest}


def is_plain_name(text: str) -> bool:
    """True for what may become the name of a folder or file: it cannot lead to another place."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*", text) is not None


def refuse_link_out(store: Path, path: Path) -> None:
    """Raise DataError when a link in the store makes `path` a file outside of it: a store is not trusted that far."""
    if files.leads_out_of(store, path):
        raise DataError(
            f"{path}: is a link to {files.local_path(path).resolve()}, out of the store; put the file itself there, or "
            "give the folder that holds all of the store"
        )


def info_path(store: Path) -> Path:
    """`store.json`."""
    return store / "store.json"


def manifest_path(store: Path) -> Path:
    """`manifest.parquet`."""
    return store / "manifest.parquet"


def chunk_maps_path(store: Path, sha256: str) -> Path:
    """Which chunks hold what: one file, named after its content, so that the manifest decides which one counts."""
    return store / f"chunk_maps-{sha256[:16]}.arrow"


def pack_path(store: Path, part: int) -> Path:
    """The pack that holds the volumes of a part."""
    return store / "packs" / f"part-{part:05d}.zarr.zip"


def overlay_path(store: Path, name: str, part: int) -> Path:
    """The pack that holds one overlay of the volumes of a part."""
    return store / "overlays" / name / f"part-{part:05d}.zarr.zip"


def source_overlay(name: str) -> str:
    """Name of the twin of an overlay: its labels on the grid of the source, for volumes that are stored on another."""
    return f"{name}{ON_SOURCE_GRID}"


def stored_overlay(name: str) -> str:
    """The overlay that `name` is the twin of, or `name` itself."""
    return name.removesuffix(ON_SOURCE_GRID)


def receipt_path(store: Path, part: int) -> Path:
    """One JSON line for each source of a part."""
    return store / "receipts" / f"part-{part:05d}.jsonl"


def duplicates_path(store: Path) -> Path:
    """One JSON line for each volume whose voxels another volume of the store holds already."""
    return store / "receipts" / "duplicates.jsonl"


def write_info(store: Path, info: StoreInfo) -> None:
    """Write `store.json`, complete or not at all."""
    durable.write_json(info_path(store), dataclasses.asdict(info))


def read_info(store: Path) -> StoreInfo:
    """Read `store.json`.

    Raises:
        DataError: not a store, a store of another format version, or a damaged `store.json`.
    """
    path = info_path(store)
    with durable.explained(DataError, path, "give the folder or URL of what `mimscale ingest ... out=STORE` wrote"):
        text = files.read_bytes(path)
    try:
        tree = json.loads(text)
        version = tree["format_version"]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: not the description of a store; give a folder that `mimscale ingest` wrote") from None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path}: store format version {version}, this mimscale reads version {FORMAT_VERSION}; "
            "ingest the sources again, or use the mimscale that wrote the store"
        )
    try:
        info = build_config(StoreInfo, tree, str(path))
    except ConfigError as error:
        raise DataError(f"{error}\nthe file is damaged: restore it, or ingest the sources again") from None
    for name in info.overlays:
        if not is_plain_name(name):
            raise DataError(f"{path}: overlay {name!r} is no name of a folder; this is no store that mimscale wrote")
    return info
