"""safetensors files written and hashed in one pass, straight from the tensors' memory.

The library's `save` copies everything first and keeps other threads from running meanwhile (a second for 360 MB), and
its `save_file` does not tell a full disk from other errors. Reading is the library's.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from typing import IO

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
WRITTEN_AT_ONCE_BYTES = 16 * 2**20  # hashed while they are warm in the processor's cache


def header(tensors: Mapping[str, Tensor]) -> bytes:
    """The beginning of a file of these tensors: its length, and name -> dtype, shape, place."""
    tree, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        tree[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    return struct.pack("<Q", len(text)) + text


def write_tensors(file: IO[bytes], tensors: Mapping[str, Tensor]) -> str:
    """Write tensors of the CPU as a safetensors file; returns its sha256.

    Raises:
        OSError: the disk is full or not writable.
    """
    start = header(tensors)
    digest = hashlib.sha256(start)
    file.write(start)
    for tensor in tensors.values():
        if not tensor.numel():
            continue
        data = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data
        for begin in range(0, len(data), WRITTEN_AT_ONCE_BYTES):
            block = data[begin : begin + WRITTEN_AT_ONCE_BYTES]
            file.write(block)
            digest.update(block)
    return digest.hexdigest()
