"""Ends this process at a time, with an exit code of ours, whoever holds the interpreter's lock then.

A Python thread cannot: it needs that lock, and a call into C that never returns may hold it for ever. faulthandler's
timer needs no lock, but its exit code is always 1. So the C library is told to call its own `_exit(code)` on a thread
of its own when a timer of the kernel is up (timer_create(2) with SIGEV_THREAD). No Python runs for it.
"""

import ctypes
import time
from typing import Any

_SIGEV_THREAD = 2  # <asm-generic/siginfo.h>, the same on glibc and musl


class _Value(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("pointer", ctypes.c_void_p))


class _Event(ctypes.Structure):
    """struct sigevent of 64-bit Linux."""

    _fields_ = (
        ("value", _Value),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("room", ctypes.c_char * 32),  # the kernel's struct has 64 bytes
    )


class _Times(ctypes.Structure):
    """struct itimerspec."""

    _fields_ = (
        ("interval_s", ctypes.c_long),
        ("interval_ns", ctypes.c_long),
        ("value_s", ctypes.c_long),
        ("value_ns", ctypes.c_long),
    )


class ExitTimer:
    """A timer that is not running until `start`.

    Args:
        exit_code: of the process when time is up.

    Raises:
        OSError: this system has no such timers.
    """

    def __init__(self, exit_code: int) -> None:
        self._library = _library()
        self._timer = ctypes.c_void_p()
        event = _Event(notify=_SIGEV_THREAD, function=ctypes.cast(self._library._exit, ctypes.c_void_p))
        event.value.number = exit_code
        self._call("timer_create", time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._timer))

    def start(self, seconds: float) -> None:
        """End the process in so many seconds from now, unless started anew before."""
        self._set(seconds)

    def close(self) -> None:
        """The process goes on."""
        self._set(0)  # what is on its way to a thread is stopped; a deleted timer may still fire
        self._call("timer_delete", self._timer)

    def _set(self, seconds: float) -> None:
        whole_s = int(seconds)
        times = _Times(value_s=whole_s, value_ns=int((seconds - whole_s) * 1e9))
        self._call("timer_settime", self._timer, 0, ctypes.byref(times), None)

    def _call(self, name: str, *arguments: Any) -> None:
        if getattr(self._library, name)(*arguments) != 0:
            raise OSError(ctypes.get_errno(), f"{name} failed")


def _library() -> ctypes.CDLL:
    for name in (None, "librt.so.1"):  # glibc before 2.34 has timers in a library of their own
        library = ctypes.CDLL(name, use_errno=True)
        if hasattr(library, "timer_create"):
            return library
    raise OSError("the C library has no timer_create")
