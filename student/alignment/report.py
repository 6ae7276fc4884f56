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
    lines = []
    for row in rows:
        lines += [
            f"{row.loss}: {row.target}",
            f"  teacher  {row.teacher}",
            f"  student  {row.student}",
            f"  rule     {row.rule}",
        ]
    return "\n".join(lines)
