"""Attention guidance of AttnDistill: the student's class rows, near the teacher's by their divergence.

Wang, Yang and van de Weijer, "Attention Distillation: self-supervised vision transformer students need more guidance",
Eq. 6 to 11. Its four cases follow from the heads and grids of both sides: as many of both (a), another grid (b), other
heads (c), both (d).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.special import xlogy

from student.alignment.attention import AttentionAligner
from student.alignment.student_spec import StudentSpec
from student.alignment.student_taps import StudentTap
from student.losses.base import Loss, LossInputs
from student.settings import AlignedLossConfig, Heads, Layers, Schedule, Weight
from student.targets.requirement import TargetTaps
from student.targets.stored_target import Targets


def divergence(student: Float[Tensor, "B L H N"], teacher: Float[Tensor, "B L H N"]) -> Float[Tensor, ""]:
    """Σ_h KL(A_t^h ‖ A_s^h) (Eq. 6, 8 and 11), mean over batch and layers.

    Args:
        student: logarithms of rows.
        teacher: rows that sum to one.
    """
    each: Tensor = xlogy(teacher, teacher) - teacher * student
    return each.sum((-1, -2)).mean()


def squares(student: Float[Tensor, "B L H N"], teacher: Float[Tensor, "B L H N"]) -> Float[Tensor, ""]:
    """The ablation's squared error in place of KL, Σ_h Σ_j (a_t − a_s)² of rows; mean as for KL."""
    return (student - teacher).square().sum((-1, -2)).mean()


class AttentionGuidanceConfig(AlignedLossConfig):
    """Settings of attention guidance.

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


class AttentionGuidanceLoss(Loss[AttentionGuidanceConfig]):
    """Attention guidance as a term of the training loss."""

    Config = AttentionGuidanceConfig

    def __init__(self, name: str, config: AttentionGuidanceConfig, student: StudentSpec, targets: Targets) -> None:
        super().__init__(name, config, student, targets)
        self.rows = AttentionAligner(name, config, student, targets[:-1] if config.value_norm else targets, "class")
        merged = not self.rows.head_pairs
        case = ("d" if merged else "b") if self.rows.resizes else ("c" if merged else "a")
        weighted = "; weighted by the norms of values" if config.value_norm else ""
        self.row = replace(self.rows.row, rule=f"case ({case}): {self.rows.row.rule}{weighted}")

    @classmethod
    def student_taps(cls, config: AttentionGuidanceConfig) -> frozenset[StudentTap]:
        """The student's class rows, with `value_norm` its values too."""
        return frozenset({"attention", "values"} if config.value_norm else {"attention"})

    @classmethod
    def target_taps(cls, config: AttentionGuidanceConfig) -> TargetTaps:
        """Class rows, or tensors that give them; with `value_norm` the values of the same layers."""
        values = ("v",) if config.value_norm else ()
        return ("class_row", *values), ("attention", *values), ("q", "k", *values)

    def forward(self, inputs: LossInputs) -> Float[Tensor, ""]:
        """The loss of one step."""
        attention, targets, weigh = inputs.student_taps.attention, inputs.targets, self.config.value_norm
        teacher = self.rows.teacher_rows(targets[:-1], targets[-1]) if weigh else self.rows.teacher_rows(targets)
        if self.config.distance == "kl":
            return divergence(self.rows.student_logs(attention, weigh=weigh), teacher)
        return squares(self.rows.student_rows(attention, weigh=weigh), teacher)
