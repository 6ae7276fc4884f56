"""Attention Transfer: a student that attends as its teacher does.

Li et al., "On the Surprising Effectiveness of Attention Transfer for Vision Transformers", section 3.2, with 1/√d.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from student import config
from student.align import Given, Shape
from student.choose import Need
from student.losses import Step
from student.rows import EPSILON, Rows
from student.seen import Reads


def distillation(student: Tensor, teacher: Tensor, heads: Literal["mean", "sum"] = "mean") -> Tensor:
    """−Σ_j A^t_ij log A^s_ij, mean over batch and queries i, summed over layers; over heads the mean or the sum.

    Heads are averaged by default, as in the authors' code, with which λ = 3 was published; the paper prints the sum.

    Args:
        student: `[B, L, H, Q, N]`, rows that sum to one.
        teacher: likewise.
        heads: how heads are reduced.
    """
    entropy = -(teacher * student.clamp_min(EPSILON).log()).sum(-1)  # [B, L, H, Q]
    by_head = entropy.mean((0, 3))
    reduced = by_head.mean(1) if heads == "mean" else by_head.sum(1)
    return reduced.sum()


def reads(settings: config.Attention) -> frozenset[Reads]:
    """The student's attention."""
    return frozenset({"attention"})


def need(name: str, settings: config.Attention, student: Shape) -> Need:
    """Whole attention maps, or q and k, which give them."""
    return Need(name, (("attention",), ("q", "k")), settings.teacher, settings.target)


class Method(nn.Module):
    """Attention distillation as a term of the training loss."""

    def __init__(self, name: str, settings: config.Attention, student: Shape, given: Sequence[Given]) -> None:
        super().__init__()
        self.rows = Rows(name, settings, student, given, "all")
        self.row, self.reduce_heads = self.rows.row, settings.reduce_heads

    def forward(self, step: Step) -> Tensor:
        """The loss of one step."""
        mine = self.rows.student_rows(step.student.q, step.student.k, step.student.scales)
        return distillation(mine, self.rows.teacher_rows(step.targets), self.reduce_heads)
