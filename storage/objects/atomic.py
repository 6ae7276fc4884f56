"""Local files, written whole or not at all."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def temporary_path(path: Path) -> Path:
    """What a file is called while it is written; a kill leaves it so, and the next writer writes over it."""
    return path.with_name(f".{path.name}.part")


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """The temporary path to write to: it takes the file's place when the block ends, and is gone after an error."""
    temporary = temporary_path(path)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
