"""Which files are images, and how folders are walked: one rule for every command."""

from __future__ import annotations

import glob
import itertools
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from storage.errors import UserError, first_line
from storage.objects.litter import is_litter
from storage.shards.tar import IMAGES

if TYPE_CHECKING:
    from collections.abc import Sequence

LITTER = "hidden file(s), or what systems leave in folders"


def kind_of(path: Path) -> str:
    """What a file is called a member for: its suffix in small letters, without the dot."""
    return path.suffix.lower().lstrip(".")


def is_image(path: Path) -> bool:
    """Whether a file is an image by its name."""
    return kind_of(path) in IMAGES


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """What lies below a folder, at any depth. Links are followed, so files of linked folders are listed too.

    Attributes:
        files: all plain files, sorted.
        lost: links that lead nowhere.
        special: pipes, sockets and devices, which nobody reads.
        litter: hidden files and folders, and what systems leave; nothing inside of them is listed.
        loops: links to a folder that they lie in themselves; not followed, as all that is there is listed already.
    """

    files: list[Path] = field(default_factory=list)
    lost: list[Path] = field(default_factory=list)
    special: list[Path] = field(default_factory=list)
    litter: list[Path] = field(default_factory=list)
    loops: list[Path] = field(default_factory=list)

    @property
    def images(self) -> list[Path]:
        """The files that are images by their names."""
        return [path for path in self.files if is_image(path)]

    def left_out(self) -> list[str]:
        """A line about each kind of what is not among the files, with a count and an example."""
        kinds = {
            "link(s) lead nowhere": self.lost,
            "pipe(s), socket(s) or device(s)": self.special,
            LITTER: self.litter,
            "link(s) lead back to a folder that they lie in, and are not followed": self.loops,
        }
        return [counted(kind, paths) for kind, paths in kinds.items() if paths]


def counted(kind: str, paths: Sequence[Path]) -> str:
    """`3 {kind}, such as {the first}`."""
    return f"{len(paths)} {kind}, such as {paths[0]}"


def listing(folder: Path) -> Listing:
    """Everything below a folder.

    Raises:
        UserError: a folder in it cannot be read.
    """
    below = Listing()
    waiting: list[tuple[Path, frozenset[tuple[int, int]]]] = [(folder, frozenset())]
    while waiting:
        place, above = waiting.pop()
        try:
            state = place.stat()
            here = (state.st_dev, state.st_ino)
            if here in above:
                below.loops.append(place)
                continue
            with os.scandir(place) as entries:
                for entry in entries:
                    path = place / entry.name
                    if is_litter(entry.name):
                        below.litter.append(path)
                        continue
                    about = path if entry.is_symlink() else entry  # an entry fails where a link leads to itself
                    if about.is_dir():
                        waiting.append((path, above | {here}))
                    elif about.is_file():
                        below.files.append(path)
                    else:
                        (below.special if path.exists() else below.lost).append(path)
        except OSError as error:
            message = f"{error.filename or place}: cannot be read: {first_line(error)}"
            raise UserError(message, hint="Fix or remove it.") from None
    for paths in (below.files, below.lost, below.special, below.litter, below.loops):
        paths.sort()
    return below


def tars_in(folder: Path) -> list[Path]:
    """The shards that lie directly in a folder, by their names, sorted."""
    return sorted(path for path in folder.glob("*.tar") if not is_litter(path.name))


def matching(pattern: str) -> list[str]:
    """The paths that a pattern with wildcards matches, sorted; where a wildcard stands, it matches no litter."""
    wild = [any(c in part for c in "*?[") for part in Path(pattern).parts]
    return [
        path
        for path in sorted(glob.glob(pattern))  # noqa: PTH207
        if not any(map(is_litter, itertools.compress(Path(path).parts, wild)))
    ]
