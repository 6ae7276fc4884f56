"""SEED: the student's similarities to earlier images, near the teacher's.

Fang et al., "SEED: Self-supervised Distillation for Visual Representation"; a baseline of AttnDistill, on its projected
class token.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from precompute.taps import full
from student.alignment.student_spec import StudentSpec
from student.losses.base import Loss, LossInputs
from student.losses.parts.projector import EMBEDDINGS, ProjectedEmbedding
from student.losses.parts.queue import Queue, unit
from student.settings import ProjectorLossConfig
from student.targets.stored_target import Targets


def cross_entropy(
    student: Float[Tensor, "B D"],
    teacher: Float[Tensor, "B D"],
    queue: Float[Tensor, "n D"],
    student_temperature: float,
    teacher_temperature: float,
) -> Float[Tensor, ""]:
    """−Σ_j p^t_j log p^s_j over the sample's own teacher embedding and the queue, mean over the batch.

    p^t = softmax(t·[t, queue] / τ_t), p^s = softmax(s·[t, queue] / τ_s).

    Args:
        student: unit vectors.
        teacher: unit vectors.
        queue: unit vectors of the teacher.
        student_temperature: τ_s.
        teacher_temperature: τ_t.
    """
    of_student, of_teacher = (
        torch.cat([(vectors * teacher).sum(-1, keepdim=True), vectors @ queue.T], 1) for vectors in (student, teacher)
    )
    target = (of_teacher / teacher_temperature).softmax(1)
    return -(target * (of_student / student_temperature).log_softmax(1)).sum(1).mean()


class SEEDConfig(ProjectorLossConfig):
    """Settings of SEED; `queue`: entries of the queue."""

    type: Literal["seed"] = "seed"
    queue: int = Field(65536, ge=1)
    student_temperature: float = Field(0.2, gt=0)
    teacher_temperature: float = Field(0.01, gt=0)


class SEEDLoss(Loss[SEEDConfig]):
    """SEED as a term of the training loss."""

    Config = SEEDConfig
    STUDENT_TAPS = frozenset({"embedding"})
    TARGET_TAPS = EMBEDDINGS

    def __init__(self, name: str, config: SEEDConfig, student: StudentSpec, targets: Targets) -> None:
        super().__init__(name, config, student, targets)
        self.token = ProjectedEmbedding(name, config, student, targets[0])
        self.queue = Queue(config.queue, self.token.width)
        self.row = self.token.row

    def forward(self, inputs: LossInputs) -> Float[Tensor, ""]:
        """The loss of one step; offers the teacher's embeddings to the queue."""
        student, teacher = unit(self.token(inputs.student_taps)), unit(full(inputs.targets[0]))
        self.queue.offer(teacher)
        temperatures = self.config.student_temperature, self.config.teacher_temperature
        return cross_entropy(student, teacher, self.queue.held, *temperatures)
