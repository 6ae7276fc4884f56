"""DeiT: distillation from a teacher's logits, hard and soft.

Touvron et al., "Training data-efficient image transformers & distillation through attention", section 4 (soft and hard
distillation); the reduction `mean` is the official code's. It acts on the distillation head where the student has one,
else on its only head. The recipe's weights stand for (1 − α) and α.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from student.alignment.rules import align_classes
from student.alignment.student_spec import StudentSpec
from student.losses.base import Loss, LossInputs
from student.settings import TeacherLossConfig
from student.targets.stored_target import Targets

Reduction = Literal["mean", "batchmean"]


def soft(
    logits: Float[Tensor, "B K"], teacher: Float[Tensor, "B K"], temperature: float = 1.0, reduction: Reduction = "mean"
) -> Float[Tensor, ""]:
    """τ² · Σ KL(softmax(t/τ) ‖ softmax(s/τ)), divided by B·K (`mean`, the official code) or by B (`batchmean`).

    Args:
        logits: of the student.
        teacher: the teacher's logits.
        temperature: τ.
        reduction: named as in `torch.nn.functional.kl_div`.
    """
    student_logs, teacher_logs = F.log_softmax(logits / temperature, 1), F.log_softmax(teacher / temperature, 1)
    total = F.kl_div(student_logs, teacher_logs, reduction="sum", log_target=True) * temperature**2
    return total / (logits.numel() if reduction == "mean" else len(logits))


def hard(logits: Float[Tensor, "B K"], teacher: Float[Tensor, "B K"]) -> Float[Tensor, ""]:
    """Cross-entropy with the teacher's decision, argmax_k t_k; mean over the batch."""
    return F.cross_entropy(logits, teacher.argmax(1))


class DeiTConfig(TeacherLossConfig):
    """Settings of the distillation from logits.

    `distillation_type` is the name of the official code's flag; hard and soft are more than two distances.
    """

    type: Literal["deit"] = "deit"
    distillation_type: Literal["hard", "soft"] = "hard"
    temperature: float = Field(1.0, gt=0)
    reduction: Reduction = "mean"
    same_classes: bool = Field(False, description="both lists of classes are the same, where one is not known")


class DeiTLoss(Loss[DeiTConfig]):
    """Distillation from logits as a term of the training loss."""

    Config = DeiTConfig
    STUDENT_TAPS = frozenset({"logits"})
    TARGET_TAPS = (("logits",),)
    supports_pooling = True

    def __init__(self, name: str, config: DeiTConfig, student: StudentSpec, targets: Targets) -> None:
        super().__init__(name, config, student, targets)
        self.row = align_classes(name, targets[0], student, config.same_classes)

    def forward(self, inputs: LossInputs) -> Float[Tensor, ""]:
        """The loss of one step; logs how often student and teacher agree."""
        (teacher,) = inputs.targets
        logits = inputs.logits if inputs.distillation_logits is None else inputs.distillation_logits
        with torch.no_grad():
            inputs.metrics[f"{self.name} agreement"] = (logits.argmax(1) == teacher.argmax(1)).float().mean()
        if self.config.distillation_type == "hard":
            return hard(logits, teacher)
        return soft(logits, teacher, self.config.temperature, self.config.reduction)
