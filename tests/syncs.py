"""Notes what makes a host wait for its device, by watching the operations that reach a kernel.

On a CPU nothing waits, but the operations are the same ones.
"""

import traceback
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Their results are Python numbers, or tensors whose shape depends on the values.
WAITING = ("_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "_unique2", "unique_dim", "equal")

# Ways to the host that are no operation where a tensor lies on the CPU already.
UNSEEN = ("cpu", "numpy", "tolist")

# With a device they make a tensor on the host, from no page-locked memory, and wait until it is copied.
MADE_ON_HOST = ("tensor", "as_tensor")


class SyncWatch(TorchDispatchMode):
    """Lists `file:function` of every operation inside the block that makes the host wait.

    `copies` are those who copy from the host to a device and do not wait, if the memory is page-locked.

    Args:
        host_works: operations on the CPU are the host's own, and nobody waits for them; else it stands for the device.
        host: tensors that would lie in the host's memory if there were a device.
    """

    def __init__(self, *, host_works=False, host=()):
        super().__init__()
        self.host_works, self.host, self.places, self.copies = host_works, host, [], set()
        self._patches = ExitStack()

    def __enter__(self):
        for name in UNSEEN:
            self._patches.enter_context(mock.patch.object(torch.Tensor, name, self._noting(name)))
        for name in MADE_ON_HOST:
            self._patches.enter_context(mock.patch.object(torch, name, self._noting_device(name)))
        return super().__enter__()

    def __exit__(self, *details):
        super().__exit__(*details)
        self._patches.close()

    def _noting(self, name):
        method = getattr(torch.Tensor, name)

        def noted(tensor, *args, **kwargs):
            is_hosts = self.host_works or any(tensor is one for one in self.host)
            if tensor.device.type == "cpu" and not is_hosts:  # of another device the dispatch mode sees the copy
                self.places.append((name, _caller()))
            return method(tensor, *args, **kwargs)

        return noted

    def _noting_device(self, name):
        make = getattr(torch, name)

        def noted(data, *args, device=None, **kwargs):
            if device is not None and not isinstance(data, torch.Tensor):
                self.places.append((name, _caller()))
            return make(data, *args, device=device, **kwargs)

        return noted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if (name in WAITING and not (self.host_works and _on_host(args))) or _blocks(name, args, kwargs):
            self.places.append((name, _caller()))
        elif _goes_over(name, args, kwargs):
            self.copies.add(_caller())
        return func(*args, **kwargs)


def _on_host(args):
    return all(arg.device.type == "cpu" for arg in args if isinstance(arg, torch.Tensor))


def _blocks(name, args, kwargs):
    """A copy between host and device that is waited for."""
    if name == "_to_copy":
        source = args[0].device
        target, goes_on = torch.device(kwargs.get("device") or source), kwargs.get("non_blocking", False)
        return source.type != target.type and (target.type == "cpu" or not goes_on)
    if name == "copy_" and args[1].device.type != args[0].device.type:
        return not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    return False


def _goes_over(name, args, kwargs):
    """A copy from the host to a device."""
    target = kwargs.get("device") if name == "_to_copy" else None
    return target is not None and args[0].device.type == "cpu" and torch.device(target).type != "cpu"


def _caller():
    """The innermost place outside of torch."""
    inside = (str(Path(torch.__file__).parent), __file__)
    frames = [frame for frame in traceback.extract_stack() if not frame.filename.startswith(inside)]
    return f"{Path(frames[-1].filename).name}:{frames[-1].name}"


# Kernels of the CPU that read a number themselves; those of CUDA read it on the device.
HOST_KERNELS = {"aten::_fused_adamw_"}


def waiting_events(profile):
    """What waits in a profile of torch, below what a dispatch mode sees too: (operation, the one that called it)."""
    found = set()
    for event in profile.events():
        name, parents, parent = event.name.removeprefix("aten::"), [], event.cpu_parent
        while parent is not None:
            parents.append(parent.name)
            parent = parent.cpu_parent
        if name in WAITING and not HOST_KERNELS & set(parents):
            found.add((name, parents[0] if parents else ""))
    return sorted(found)
