"""ADViT: the class row of every layer, matched with the teacher's by its distance.

"ADViT" (see docs/papers.md), equations 5 and 6. Heads are averaged on both sides, since the paper's teacher and
students have different numbers of them and it does not say how they meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from student import config
from student.align import Given, Shape
from student.choose import Need
from student.losses import Step
from student.rows import Rows
from student.seen import Reads


def distance(student: Tensor, teacher: Tensor, prefix: int, kind: Literal["l1", "l2"] = "l1") -> Tensor:
    """Σ_i |A^s_i − A^t_i| (Eq. 5) or Σ_i (A^s_i − A^t_i)² (Eq. 6) over the patch keys i.

    Mean over batch, layers and heads.

    Args:
        student: class rows `[B, L, H, N]`.
        teacher: likewise.
        prefix: how many of the N tokens are no patches.
        kind: of distance.
    """
    difference = (student - teacher)[..., prefix:]
    each = difference.abs() if kind == "l1" else difference.square()
    return each.sum(-1).mean()


def reads(settings: config.ADViT) -> frozenset[Reads]:
    """The student's class rows."""
    return frozenset({"attention"})


def need(name: str, settings: config.ADViT, student: Shape) -> Need:
    """Class rows, or what gives them."""
    return Need(name, (("class_row",), ("attention",), ("q", "k")), settings.teacher, settings.target)


class Method(nn.Module):
    """ADViT as a term of the training loss."""

    def __init__(self, name: str, settings: config.ADViT, student: Shape, given: Sequence[Given]) -> None:
        super().__init__()
        self.rows = Rows(name, settings, student, given, "class")
        self.row, self.distance = self.rows.row, settings.distance

    def forward(self, step: Step) -> Tensor:
        """The loss of one step."""
        mine = self.rows.student_rows(step.student.q, step.student.k, step.student.scales)
        return distance(mine, self.rows.teacher_rows(step.targets), self.rows.prefix, self.distance)
