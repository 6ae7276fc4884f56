"""Attention guidance of AttnDistill: the student's class rows, near the teacher's by their divergence.

Wang, Yang and van de Weijer, "Attention Distillation: self-supervised vision transformer students need more guidance",
Eq. 6 to 11. Its four cases follow from the heads and grids of both sides: as many of both (a), another grid (b), other
heads (c), both (d).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from pydantic import Field
from torch import Tensor, nn
from torch.special import xlogy

from student.alignment.attention import AttentionAligner
from student.alignment.student_spec import StudentSpec
from student.alignment.student_taps import StudentTap
from student.losses.base import LossInputs
from student.settings import AlignedLossConfig, Heads, Layers, Schedule, Weight
from student.targets.requirement import TargetRequirement
from student.targets.stored_target import StoredTarget


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Σ_h KL(A_t^h ‖ A_s^h) (Eq. 6, 8 and 11), mean over batch and layers.

    Args:
        student: logarithms of rows, `[B, L, H, N]`.
        teacher: rows that sum to one, likewise.
    """
    each: Tensor = xlogy(teacher, teacher) - teacher * student
    return each.sum((-1, -2)).mean()


def squares(student: Tensor, teacher: Tensor) -> Tensor:
    """The ablation's squared error in place of KL, Σ_h Σ_j (a_t − a_s)² of rows `[B, L, H, N]`, reduced likewise."""
    return (student - teacher).square().sum((-1, -2)).mean()


class Settings(AlignedLossConfig):
    """Class rows by their divergence.

    value_norm: each key's attention is weighted by the norm of its value, on both sides.
    """

    type: Literal["guidance"] = "guidance"
    weight: Weight = Schedule(start=0.1)
    layers: Layers | None = "last"
    heads: Heads = "auto"
    head_temperature: float | None = Field(10.0, gt=0)
    grid: Literal["bicubic"] | None = "bicubic"
    distance: Literal["kl", "mse"] = "kl"
    value_norm: bool = False


def reads(settings: Settings) -> frozenset[StudentTap]:
    """The student's class rows, and the values that they weigh where asked for."""
    return frozenset({"attention", "values"} if settings.value_norm else {"attention"})


def need(name: str, settings: Settings, student: StudentSpec) -> TargetRequirement:
    """Class rows, or what gives them; with value norms the values of the same layers."""
    taps: list[tuple[str, ...]] = [("class_row",), ("attention",), ("q", "k")]
    if settings.value_norm:
        taps = [(*several, "v") for several in taps]
    return TargetRequirement(name, tuple(taps), settings.teacher, settings.target)


class Method(nn.Module):
    """Attention guidance as a term of the training loss."""

    def __init__(self, name: str, settings: Settings, student: StudentSpec, given: Sequence[StoredTarget]) -> None:
        super().__init__()
        self.values = settings.value_norm
        self.rows = AttentionAligner(name, settings, student, given[:-1] if self.values else given, "class")
        merged = not self.rows.head_pairs
        case = ("d" if merged else "b") if self.rows.resizes else ("c" if merged else "a")
        weighed = "; weighted by the norms of values" if self.values else ""
        self.row = replace(self.rows.row, rule=f"case ({case}): {self.rows.row.rule}{weighed}")
        self.distance = settings.distance

    def forward(self, step: LossInputs) -> Tensor:
        """The loss of one step."""
        seen, targets, own, stored = step.student, step.targets, None, None
        if self.values:
            targets, own, stored = targets[:-1], seen.v, targets[-1]
        theirs = self.rows.teacher_rows(targets, stored)
        if self.distance == "kl":
            return divergence(self.rows.student_logs(seen.q, seen.k, seen.scales, own), theirs)
        return squares(self.rows.student_rows(seen.q, seen.k, seen.scales, own), theirs)
