"""DeiT: distillation from a teacher's logits, hard and soft.

Touvron et al., "Training data-efficient image transformers & distillation through attention", section 4 (soft and hard
distillation); the reduction `mean` is the official code's. It acts on the distillation head where the student has one,
else on its only head. The recipe's weights stand for (1 − α) and α.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from student.alignment.rules import align_classes
from student.alignment.student_spec import StudentSpec
from student.alignment.student_taps import StudentTap
from student.losses.base import LossInputs
from student.settings import TeacherLossConfig
from student.targets.requirement import TargetRequirement
from student.targets.stored_target import StoredTarget

Reduction = Literal["mean", "batchmean"]


def soft(logits: Tensor, teacher: Tensor, temperature: float = 1.0, reduction: Reduction = "mean") -> Tensor:
    """τ² · Σ KL(softmax(t/τ) ‖ softmax(s/τ)), divided by B·K (`mean`, the official code) or by B (`batchmean`).

    Args:
        logits: of the student, `[B, K]`.
        teacher: its logits, `[B, K]`.
        temperature: τ.
        reduction: what the sum is divided by.
    """
    ours, theirs = F.log_softmax(logits / temperature, 1), F.log_softmax(teacher / temperature, 1)
    total = F.kl_div(ours, theirs, reduction="sum", log_target=True) * temperature**2
    return total / (logits.numel() if reduction == "mean" else len(logits))


def hard(logits: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy with the teacher's decision, argmax_k t_k; mean over the batch."""
    return F.cross_entropy(logits, teacher.argmax(1))


POOLED = True


class Settings(TeacherLossConfig):
    """Distillation from logits.

    `distillation_type` has the name of the official code's flag, since hard and soft are no two distances.
    """

    type: Literal["deit"] = "deit"
    distillation_type: Literal["hard", "soft"] = "hard"
    temperature: float = Field(1.0, gt=0)
    reduction: Literal["mean", "batchmean"] = "mean"
    same_classes: bool = Field(False, description="both lists of classes are the same, where one is not known")


def reads(settings: Settings) -> frozenset[StudentTap]:
    """Logits."""
    return frozenset({"logits"})


def need(name: str, settings: Settings, student: StudentSpec) -> TargetRequirement:
    """The teacher's logits."""
    return TargetRequirement(name, (("logits",),), settings.teacher, settings.target)


class Method(nn.Module):
    """Distillation from logits as a term of the training loss."""

    def __init__(self, name: str, settings: Settings, student: StudentSpec, given: Sequence[StoredTarget]) -> None:
        super().__init__()
        self.row = align_classes(name, given[0], student, settings.same_classes)
        self.name, self.settings = name, settings

    def forward(self, step: LossInputs) -> Tensor:
        """The loss of one step; notes how often student and teacher decide alike."""
        (teacher,) = step.targets
        logits = step.logits if step.distilled is None else step.distilled
        with torch.no_grad():
            step.notes[f"{self.name} agreement"] = (logits.argmax(1) == teacher.argmax(1)).float().mean()
        if self.settings.distillation_type == "hard":
            return hard(logits, teacher)
        return soft(logits, teacher, self.settings.temperature, self.settings.reduction)
