"""What all commands of `pipeline evaluate` share."""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.console import Console
from storage.errors import UserError
from storage.shards.shard import Shard, open_shards
from student import run_dir
from student.evaluation.ensemble import Classifier
from student.models.files import StudentDescription, load_student

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch
    from torch import nn

LIVE = "live"  # the source of what a teacher says now


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedStudent:
    """Which student was evaluated: its file, its evaluation view, and whether a smoke run made it."""

    student: str
    view: str
    smoke: bool

    @property
    def name(self) -> str:
        """What tables call it."""
        return self.student

    @property
    def how(self) -> str:
        """In words, what it was evaluated on."""
        return self.view


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedTeacher:
    """Which teacher was evaluated.

    Attributes:
        teacher: its name.
        source: id of the stored target that was read, or `live`.
        view: line of the evaluation view.
        view_size: its side in pixels.
    """

    teacher: str
    source: str
    view: str
    view_size: int

    @property
    def name(self) -> str:
        """What tables call it."""
        return self.teacher

    @property
    def how(self) -> str:
        """In words, what it was evaluated on."""
        return f"{self.view} at {self.view_size}, {'live' if self.source == LIVE else f'stored: {self.source}'}"


Evaluated = EvaluatedStudent | EvaluatedTeacher


def named_sets(patterns: Sequence[str]) -> dict[str, list[Shard]]:
    """Shards by the names of their sets; those without a name are the set ``.

    A name ends at the first `=`, and has no slash in it, as `split=val/000000.tar` may be an existing path.

    Raises:
        UserError: as `expand` does; a set's name without shards.
    """
    named: dict[str, list[str]] = {}
    for pattern in patterns:
        match = re.fullmatch(r"([\w.-]+)=(.*)", pattern)
        name, rest = (match[1], match[2]) if match and not Path(pattern).exists() else ("", pattern)
        if not rest:
            raise UserError(f"--shards {pattern}: a name without shards; expected {name}=SHARDS")
        named.setdefault(name, []).append(rest)
    return {name: open_shards(shards, Console().say) for name, shards in named.items()}


def only_set(patterns: Sequence[str]) -> list[Shard]:
    """Shards of a command that takes one set. Raises UserError: one with a name, or as `expand` does."""
    sets = named_sets(patterns)
    if named := [name for name in sets if name]:
        raise UserError(f"--shards {named[0]}=…: named sets are for `evaluate accuracy`; give the shards alone")
    return sets[""]


def open_student(
    path: Path, device: torch.device, load: Callable[[Path], tuple[nn.Module, StudentDescription]] = load_student
) -> tuple[Classifier, EvaluatedStudent]:
    """A student on a device, and which it is; the console warns about one that learned nothing."""
    model, about = load(path)
    smoke = run_dir.is_smoke(path.parent)
    if smoke:
        Console().say(f"{path}: from a smoke run, which learned nothing")
    member = Classifier(name=str(path), model=model.to(device), about=about)
    return member, EvaluatedStudent(student=member.name, view=about.evaluation, smoke=smoke)


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show the progress of so many steps; give what is called with each number of further ones."""
    with Console() as console:
        console.start(what, total)
        yield console.advance


def number(value: float | None, digits: int = 2) -> str:
    """A number for a table; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells below each other: the first column to the left, the others to the right."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
