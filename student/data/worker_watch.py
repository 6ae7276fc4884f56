"""Loader workers that die: which one, by what, how much memory there is, and what takes less."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from multiprocessing import active_children
from multiprocessing.connection import wait
from typing import TYPE_CHECKING

from storage.errors import UserError
from storage.memory import out_of_memory
from storage.progress import size_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from multiprocessing.process import BaseProcess

GRACE = 1.0  # seconds


@contextmanager
def started(into: list[BaseProcess]) -> Iterator[None]:
    """Adds the processes that are started meanwhile, in their order."""
    before = set(active_children())
    yield
    into += sorted(set(active_children()) - before, key=lambda process: process.pid or 0)


@contextmanager
def watched(processes: Sequence[BaseProcess], held: int, advice: str) -> Iterator[None]:
    """Whatever goes wrong meanwhile, the death of a worker is its cause, and is what is said.

    PyTorch raises a RuntimeError in the main thread, wherever that just is, within an update too; or a connection to
    the worker breaks, as an EOFError or an OSError.

    Args:
        processes: the workers, in their order; it may grow meanwhile.
        held: bytes that all of them read ahead.
        advice: what to do.

    Raises:
        UserError: one has died.
    """
    try:
        yield
    except Exception as error:
        if processes and not isinstance(error, UserError):  # a connection breaks a moment before its process has ended
            for sentinel in wait([process.sentinel for process in processes], GRACE):
                next(process for process in processes if process.sentinel == sentinel).join(GRACE)
        for number, process in enumerate(processes, 1):
            if process.exitcode:
                name = f"loader worker {number} of {len(processes)} (process {process.pid})"
                raise UserError(f"{name} {_end(process.exitcode, held, advice)}") from None
        raise


def _end(code: int, held: int, advice: str) -> str:
    if code > 0:
        return f"ended with status {code}: see what it printed above; {advice}"
    name = signal.Signals(-code).name
    if -code == signal.SIGKILL:
        return f"was killed by {name}: {out_of_memory(f'workers read up to {size_text(held)} ahead; {advice}')}"
    if -code == signal.SIGBUS:
        full = "the usual cause is that /dev/shm is full (Docker's option shm-size, such as 8g)"
        return f"was ended by {name}: {full}; {advice}"
    return f"was ended by {name}; {advice}"
