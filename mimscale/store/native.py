"""The loop over chunks in C, where it could be built and the libraries whose functions it calls are found.

`read_boxes` and `file_system` are None otherwise: the reader then does the same in Python, more slowly, and
maps nothing.
"""

import ctypes
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any


def _address(symbol: str, extension: str) -> int:
    """Address of a function of the C library that an extension module is linked to.

    Raises:
        ImportError: the module is missing, is built without the library, or hides it.
    """
    path = import_module(extension).__file__
    try:
        # A look-up in a library goes through those that it is linked to: nobody needs to know their files.
        function = getattr(ctypes.CDLL(path), symbol)
    except (OSError, AttributeError) as error:
        raise ImportError(f"{extension} has no {symbol}: {error}") from None
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address


def _load() -> tuple[Callable[..., Any] | None, Callable[[int], int] | None, str]:
    if sys.byteorder != "little":
        return None, None, "a loop in Python, because this machine is not little-endian as the chunks are"
    try:
        from mimscale.store import _chunks

        blosc = _address("blosc_decompress_ctx", "imagecodecs._blosc")
        crc32c = _address("crc32c_extend", "google_crc32c._crc32c")
    except ImportError as error:
        return (
            None,
            None,
            (
                f"a loop in Python, slower than the one in C, which cannot be used ({error}); "
                "install mimscale again where there is a C compiler"
            ),
        )
    try:
        lz4 = _address("LZ4_decompress_safe", "imagecodecs._blosc")
    except ImportError:
        lz4 = 0  # built into Blosc: Blosc decodes everything
    return partial(_chunks.read_boxes, blosc, lz4, crc32c), _chunks.file_system, "a loop in C"


read_boxes, file_system, description = _load()
