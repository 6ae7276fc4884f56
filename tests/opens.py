"""Counting how often files are opened, by whatever library or process: Linux's inotify tells it."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

OPEN, CLOSE_NOWRITE, OVERFLOW = 0x20, 0x10, 0x4000
EVENT = struct.Struct("iIII")


@contextmanager
def counted_opens(*folders: Path) -> Iterator[Counter[str]]:
    """Name of a file directly in one of the folders -> how often it was opened meanwhile; filled in at the end.

    Closing is watched too: equal events that follow each other would be merged into one.
    """
    if not sys.platform.startswith("linux"):
        pytest.skip("inotify is Linux's")
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(os.O_NONBLOCK)
    counts: Counter[str] = Counter()
    try:
        for folder in folders:
            assert libc.inotify_add_watch(descriptor, os.fsencode(folder), OPEN | CLOSE_NOWRITE) > 0
        yield counts
        while True:
            try:
                events = os.read(descriptor, 1 << 20)
            except BlockingIOError:
                break
            at = 0
            while at < len(events):
                _, mask, _, length = EVENT.unpack_from(events, at)
                assert not mask & OVERFLOW
                at += EVENT.size + length
                name = events[at - length : at].rstrip(b"\0").decode()
                counts[name] += bool(mask & OPEN and name)
    finally:
        os.close(descriptor)
    for name in [name for name, count in counts.items() if not count]:
        del counts[name]
