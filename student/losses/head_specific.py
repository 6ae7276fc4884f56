"""Head-specific distillation: chosen heads of a student attend as chosen heads of a larger teacher do.

Ahmad, "Enhancing Vision Transformers through Head-Specific Knowledge Distillation", equations 2.8 to 2.11; 2.11 without
the minus that makes it negative. Which layers and heads meet says whether it is head to head, block to block or encoder
to encoder; all other heads stay free. The recipe's weights stand for α and (1 − α) of Eq. 2.14.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor
from torch.special import xlogy

from student.alignment.attention import AttentionAligner
from student.alignment.rules import align_classes
from student.alignment.student_spec import StudentSpec
from student.alignment.student_taps import StudentTap
from student.losses.base import Loss, LossInputs
from student.settings import AlignedLossConfig, FirstHeads, HeadMap, HeadPairs
from student.targets.requirement import TargetTaps
from student.targets.stored_target import Targets

Distance = Literal["mse", "mse-softmax", "ce", "kl"]


def difference(
    student: Float[Tensor, "B L H Q N"], teacher: Float[Tensor, "B L H Q N"], distance: Distance
) -> Float[Tensor, " B"]:
    """How far each sample's attention is from its teacher's; mean over layers, heads and queries.

    `mse`, `mse-softmax`: (a^t − a^s)² (Eq. 2.9), mean over keys too, of scores or of rows. `ce`: −Σ_j A^t_j log A^s_j
    (Eq. 2.10). `kl`: Σ_j A^t_j log(A^t_j / A^s_j) (Eq. 2.11).

    Args:
        student: scores for `mse`, rows for `mse-softmax`, and their logarithms for `ce` and `kl`.
        teacher: scores for `mse`, else rows that sum to one.
        distance: reading.
    """
    if distance in ("mse", "mse-softmax"):
        return (teacher - student).square().flatten(1).mean(1)
    each = -teacher * student
    if distance == "kl":
        each = each + xlogy(teacher, teacher)
    return each.sum(-1).flatten(1).mean(1)


def correctness(
    logits: Float[Tensor, "B K"],
    labels: Int64[Tensor, " B"],
    mix_labels: Int64[Tensor, " B"],
    mix_weights: Float[Tensor, " B"],
) -> Float[Tensor, " B"]:
    """How right a prediction is, in [0, 1], no gradient: share of the predicted class in the (mixed) label.

    Args:
        logits: of the student or the teacher.
        labels: of the images.
        mix_labels: labels of the images that were mixed in.
        mix_weights: share of the mixed-in image.
    """
    predicted = logits.detach().argmax(1)
    own, mixed_in = ((predicted == label).to(mix_weights) for label in (labels, mix_labels))
    return torch.lerp(own, mixed_in, mix_weights)


class HeadSpecificConfig(AlignedLossConfig):
    """Settings of head-specific distillation; `adaptive` weights each sample by how right a prediction is."""

    type: Literal["head_specific"] = "head_specific"
    distance: Distance = "mse"
    heads: FirstHeads | HeadPairs | HeadMap | None = "first"
    adaptive: Literal["none", "student-correct", "teacher-correct"] = "none"
    same_classes: bool = Field(False, description="as for deit; for adaptive: teacher-correct")


class HeadSpecificLoss(Loss[HeadSpecificConfig]):
    """Head-specific distillation as a term of the training loss."""

    Config = HeadSpecificConfig

    def __init__(self, name: str, config: HeadSpecificConfig, student: StudentSpec, targets: Targets) -> None:
        super().__init__(name, config, student, targets)
        classes = None
        if config.adaptive == "teacher-correct":
            *targets, logits = targets
            classes = align_classes(name, logits, student, config.same_classes)
        self.rows = AttentionAligner(name, config, student, targets, "scores" if config.distance == "mse" else "all")
        self.row = self.rows.row
        if classes is not None:
            self.row = replace(self.row, rule=f"{self.row.rule}; {classes.teacher}: {classes.rule}")

    @classmethod
    def student_taps(cls, config: HeadSpecificConfig) -> frozenset[StudentTap]:
        """The student's attention, and labels where samples are weighted."""
        return frozenset({"attention"} if config.adaptive == "none" else {"attention", "labels"})

    @classmethod
    def target_taps(cls, config: HeadSpecificConfig) -> TargetTaps:
        """Whole maps, or q and k; scores come from q and k alone, since maps have lost a constant of each row."""
        logits = ("logits",) if config.adaptive == "teacher-correct" else ()
        maps = () if config.distance == "mse" else (("attention", *logits),)
        return *maps, ("q", "k", *logits)

    def forward(self, inputs: LossInputs) -> Float[Tensor, ""]:
        """The loss of one step; logs how much of it is kept where samples are weighted."""
        config, taps, targets = self.config, inputs.student_taps, inputs.targets
        student_rows = self.rows.student_logs if config.distance in ("ce", "kl") else self.rows.student_rows
        student = student_rows(taps.attention)
        attention = targets[:-1] if config.adaptive == "teacher-correct" else targets
        by_sample = difference(student, self.rows.teacher_rows(attention), config.distance)
        if config.adaptive == "none":
            return by_sample.mean()
        logits = targets[-1]
        if config.adaptive == "student-correct":
            second = inputs.distillation_logits
            logits = inputs.logits if second is None else inputs.logits + second  # as it is evaluated
        kept = correctness(logits, inputs.labels, inputs.mix_labels, inputs.mix_weights)
        inputs.metrics[f"{self.name} kept"] = kept.mean()
        return (kept * by_sample).mean()
