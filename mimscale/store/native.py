"""The loop over chunks in C, where it could be built and the libraries whose functions it calls are found.

`read_boxes` is None otherwise: the reader then does the same in Python, two to three times more slowly.
"""

import ctypes
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import google_crc32c
import imagecodecs

_BLOSC = ("blosc_decompress_ctx", imagecodecs, "_blosc")
_CRC32C = ("crc32c_extend", google_crc32c, "_crc32c")


def _address(symbol: str, package: ModuleType, extension: str) -> int:
    """Address of a function of the C library that an extension module of a package is linked to.

    Raises:
        ImportError: the package is built without it, or hides it.
    """
    module = __import__(f"{package.__name__}.{extension}", fromlist=[extension])
    try:
        # A look-up in a library goes through those that it is linked to: nobody needs to know their files.
        function = getattr(ctypes.CDLL(module.__file__), symbol)
    except (OSError, AttributeError) as error:
        raise ImportError(f"{package.__name__} has no {symbol}: {error}") from None
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address
    return address


def _load() -> tuple[Callable[..., Any] | None, str]:
    if sys.byteorder != "little":
        return None, "Python (chunks are little-endian, this machine is not)"
    try:
        from mimscale.store import _chunks

        decode = partial(_chunks.read_boxes, _address(*_BLOSC), _address(*_CRC32C))
    except ImportError as error:
        return None, f"Python, slowly ({error}); install mimscale again where there is a C compiler"
    return decode, "C"


read_boxes, description = _load()
