"""Files in local folders: written whole or not at all, and which of them are images, by one rule for every command."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from storage.tars import IMAGES


def unfinished(path: Path) -> Path:
    """What a file is called while it is written; a kill leaves it so, and the next writer writes over it."""
    return path.with_name(f".{path.name}.part")


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """The temporary path to write to: it takes the file's place when the block ends, and is gone after an error."""
    temporary = unfinished(path)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def kind_of(path: Path) -> str:
    """What a file is called a member for: its suffix in small letters, without the dot."""
    return path.suffix.lower().lstrip(".")


def is_image(path: Path) -> bool:
    """Whether a file is an image by its name."""
    return kind_of(path) in IMAGES


def files_below(folder: Path) -> list[Path]:
    """All files below a folder at any depth, sorted, but hidden ones and those in hidden folders (`._1.jpg`)."""
    found = sorted(folder.rglob("*"))
    return [
        path
        for path in found
        if not any(part.startswith(".") for part in path.relative_to(folder).parts) and path.is_file()
    ]


def images_below(folder: Path) -> list[Path]:
    """The images among `files_below`."""
    return [path for path in files_below(folder) if is_image(path)]
