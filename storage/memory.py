"""Memory that processes may take on this machine, and what to say where one died for want of it."""

from __future__ import annotations

import contextlib
import ctypes
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from storage.progress import size_text

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

# Of glibc's mallopt: blocks of so many bytes are mapped by themselves; so much free memory is kept for the next ones.
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1


def memory_limit() -> int:
    """Bytes that all processes here may take together: of the machine, or of its container."""
    from distributed.system import MEMORY_LIMIT  # half a second to import

    return MEMORY_LIMIT


def out_of_memory(advice: str) -> str:
    """The usual cause of a process that was killed, with the memory that processes may take here, and what to do."""
    limit = size_text(memory_limit())
    return f"the usual cause is that memory ran out and the kernel killed it ({limit} may be taken here); {advice}"


def return_memory() -> None:
    """Give what is no longer used back to the system: glibc keeps what large objects took for the next ones."""
    _glibc("malloc_trim", 0)


def in_own_heap(make: Callable[[], T]) -> T:
    """What a call gives that takes and frees large blocks: those that it frees go back to the system at once.

    They are mapped one by one in place of lying between others, and what the process freed before is not in the way:
    glibc gives a new thread a heap of its own. Opening a session of 1.2 GB of weights takes 1.2 GB so, else 2.0.
    """
    _glibc("mallopt", _MMAP_THRESHOLD, 1 << 20)
    try:
        with ThreadPoolExecutor(1, "heap") as thread:
            return thread.submit(make).result()
    finally:
        # As high as glibc's own rule goes, which ends once one of them is set: else arrays are mapped again and again.
        _glibc("mallopt", _MMAP_THRESHOLD, 32 << 20)
        _glibc("mallopt", _TRIM_THRESHOLD, 64 << 20)


def _glibc(function: str, *numbers: int) -> None:
    with contextlib.suppress(AttributeError, OSError):  # other systems' libraries have no such function
        getattr(ctypes.CDLL(None), function)(*numbers)
