"""Head-specific distillation: chosen heads of a student attend as chosen heads of a larger teacher do.

Ahmad, "Enhancing Vision Transformers through Head-Specific Knowledge Distillation", equations 2.8 to 2.11; 2.11 without
the minus that makes it negative. Which layers and heads meet says whether it is head to head, block to block or encoder
to encoder; all others stay free. The recipe's weights stand for α and (1 − α) of Eq. 2.14.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.special import xlogy

from student.alignment.attention import AttentionAligner
from student.alignment.rules import align_classes
from student.alignment.student_spec import StudentSpec
from student.alignment.student_taps import StudentTap
from student.losses.base import LossInputs
from student.settings import AlignedLossConfig, FirstHeads, HeadMap, HeadPairs
from student.targets.requirement import TargetRequirement
from student.targets.stored_target import StoredTarget


def difference(student: Tensor, teacher: Tensor, kind: Literal["mse", "mse-softmax", "ce", "kl"]) -> Tensor:
    """How far each sample's attention is from its teacher's, `[B]`; mean over layers, heads and queries.

    `mse`, `mse-softmax`: (a^t − a^s)² (Eq. 2.9), mean over keys too, of scores or of rows. `ce`: −Σ_j A^t_j log A^s_j
    (Eq. 2.10). `kl`: Σ_j A^t_j log(A^t_j / A^s_j) (Eq. 2.11).

    Args:
        student: `[B, L, H, Q, N]`, scores for `mse`, rows for `mse-softmax`, and their logarithms for `ce` and `kl`.
        teacher: scores for `mse`, else rows that sum to one, likewise.
        kind: of difference.
    """
    if kind in ("mse", "mse-softmax"):
        return (teacher - student).square().flatten(1).mean(1)
    each = -teacher * student
    if kind == "kl":
        each = each + xlogy(teacher, teacher)
    return each.sum(-1).flatten(1).mean(1)


def rightness(logits: Tensor, labels: Tensor, others: Tensor, shares: Tensor) -> Tensor:
    """How right a decision is, `[B]` in [0, 1] without gradient: the share of the decided class in the (mixed) label.

    Args:
        logits: of whoever decides, `[B, K]`.
        labels: int64 `[B]`.
        others: int64 `[B]`, labels of the mixing partners.
        shares: f32 `[B]`, the partners' shares.
    """
    decided = logits.detach().argmax(1)
    return torch.lerp((decided == labels).to(shares), (decided == others).to(shares), shares)


class Settings(AlignedLossConfig):
    """Attention of chosen heads, one to one."""

    type: Literal["head_specific"] = "head_specific"
    distance: Literal["mse", "mse-softmax", "ce", "kl"] = "mse"
    heads: FirstHeads | HeadPairs | HeadMap | None = "first"
    adaptive: Literal["none", "student-correct", "teacher-correct"] = "none"
    same_classes: bool = Field(False, description="as for deit; for adaptive: teacher-correct")


def reads(settings: Settings) -> frozenset[StudentTap]:
    """The student's attention, and labels where samples are weighted."""
    return frozenset({"attention"} if settings.adaptive == "none" else {"attention", "labels"})


def need(name: str, settings: Settings, student: StudentSpec) -> TargetRequirement:
    """Whole maps, or q and k; scores come from q and k alone, since maps have lost a constant of each row."""
    taps: tuple[tuple[str, ...], ...] = (("q", "k"),) if settings.distance == "mse" else (("attention",), ("q", "k"))
    if settings.adaptive == "teacher-correct":
        taps = tuple((*several, "logits") for several in taps)
    return TargetRequirement(name, taps, settings.teacher, settings.target)


class Method(nn.Module):
    """Head-specific distillation as a term of the training loss."""

    def __init__(self, name: str, settings: Settings, student: StudentSpec, given: Sequence[StoredTarget]) -> None:
        super().__init__()
        self.name, self.distance, self.adaptive = name, settings.distance, settings.adaptive
        classes = None
        if settings.adaptive == "teacher-correct":
            *given, last = given
            classes = align_classes(name, last, student, settings.same_classes)
        self.rows = AttentionAligner(name, settings, student, given, "scores" if settings.distance == "mse" else "all")
        self.row = self.rows.row
        if classes is not None:
            self.row = replace(self.row, rule=f"{self.row.rule}; {classes.teacher}: {classes.rule}")

    def forward(self, step: LossInputs) -> Tensor:
        """The loss of one step; notes how much of it is kept where samples are weighted."""
        of_student = self.rows.student_logs if self.distance in ("ce", "kl") else self.rows.student_rows
        mine = of_student(step.student.q, step.student.k, step.student.scales)
        attention = step.targets[:-1] if self.adaptive == "teacher-correct" else step.targets
        each = difference(mine, self.rows.teacher_rows(attention), self.distance)
        if self.adaptive == "none":
            return each.mean()
        decides = step.targets[-1]
        if self.adaptive == "student-correct":
            decides = step.logits if step.distilled is None else step.logits + step.distilled  # as it is evaluated
        kept = rightness(decides, step.labels, step.others, step.shares)
        step.notes[f"{self.name} kept"] = kept.mean()
        return (kept * each).mean()
