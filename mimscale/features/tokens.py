"""Token maps as Zarr v3: one array a volume, in a zip that is complete or absent and has the same bytes each time.

W windows of a volume | z y x tokens of a window | D numbers of a token
"""

import json
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimscale import durable
from mimscale.errors import DataError
from mimscale.features.layout import WAY_OUT

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the oldest time that a zip can hold


class TokenWriter:
    """Appends the token maps of volumes to an open zip."""

    def __init__(self, file: zipfile.ZipFile) -> None:
        self._zip = file
        self._write("zarr.json", json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {}}).encode())

    def add(self, volume_id: str, tokens: NDArray[Any], origins: Sequence[Sequence[int]], **attributes: Any) -> None:
        """Append the tokens [W, z, y, x, D] of a volume, a chunk a window.

        Args:
            volume_id: name of the array.
            tokens: float16 or float32.
            origins: first voxel (Z, Y, X) of each window.
            attributes: what else stands beside the array.
        """
        import zarr
        from zarr.storage import MemoryStore

        entries: dict[str, Any] = {}
        array = zarr.create_array(
            MemoryStore(entries),
            name=volume_id,
            shape=tokens.shape,
            dtype=tokens.dtype,
            chunks=(1, *tokens.shape[1:]),
            dimension_names=("window", "z", "y", "x", "feature"),
            attributes={**attributes, "origins_zyx": [list(map(int, origin)) for origin in origins]},
        )
        array[...] = tokens
        for name in sorted(entries):
            if name != "zarr.json":  # of the root, which is written already
                self._write(name, entries[name].to_bytes())

    def _write(self, name: str, data: bytes) -> None:
        entry = zipfile.ZipInfo(name, _EPOCH)
        entry.external_attr = 0o644 << 16
        entry.create_system = 3  # Unix, whatever this runs on
        self._zip.writestr(entry, data)


@contextmanager
def token_writer(path: Path) -> Iterator[TokenWriter]:
    """Write a zip of token maps, complete or not at all.

    Raises:
        DataError: the disk is full or not writable.
    """
    with (
        durable.explained(DataError, path, WAY_OUT),
        durable.open_atomically(path) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
    ):
        yield TokenWriter(archive)


def read_tokens(path: Path, volume_id: str) -> NDArray[Any]:
    """The tokens [W, z, y, x, D] of one volume."""
    import zarr
    from zarr.storage import ZipStore

    with ZipStore(path, mode="r") as store:
        array = zarr.open_array(store, path=volume_id, mode="r")
        return np.asarray(array[...])
