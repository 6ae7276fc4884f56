"""The printed table of what meets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class AlignmentRow:
    """One line of the printed table."""

    loss: str
    target: str
    teacher: str
    student: str
    rule: str


def alignment_table(rows: Sequence[AlignmentRow]) -> str:
    """The printed table of all that meets."""
    return "\n".join(
        f"{row.loss}: {row.target}\n  teacher  {row.teacher}\n  student  {row.student}\n  rule     {row.rule}"
        for row in rows
    )
