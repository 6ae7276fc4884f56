"""Files in local folders: which of them are images, by one rule for every command."""

from __future__ import annotations

from pathlib import Path

from storage.tars import IMAGES


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
