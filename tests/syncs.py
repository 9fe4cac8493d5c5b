"""Notes what makes a host wait for its device, by watching the operations that reach a kernel.

On a CPU nothing waits, but the operations are the same ones.
"""

import traceback
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Their results are Python numbers, or tensors whose shape depends on the values.
WAITING = ("_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "_unique2", "unique_dim", "equal")


class SyncWatch(TorchDispatchMode):
    """Lists `file:function` of every operation inside the block that makes the host wait."""

    def __init__(self):
        super().__init__()
        self.places = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in WAITING or _comes_back(name, args, kwargs):
            self.places.append((name, _caller()))
        return func(*args, **kwargs)


def _comes_back(name, args, kwargs):
    """A copy from a device to the host that is waited for."""
    source = next((arg for arg in args if isinstance(arg, torch.Tensor)), None)
    if name == "_to_copy" and source is not None and source.device.type != "cpu":
        return torch.device(kwargs.get("device") or source.device).type == "cpu"
    if name == "copy_" and args[0].device.type == "cpu" and args[1].device.type != "cpu":
        return not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    return False


def _caller():
    """The innermost place outside of torch."""
    inside = (str(Path(torch.__file__).parent), __file__)
    frames = [frame for frame in traceback.extract_stack() if not frame.filename.startswith(inside)]
    return f"{Path(frames[-1].filename).name}:{frames[-1].name}"
