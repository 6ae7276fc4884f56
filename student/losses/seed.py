"""SEED: the student's similarities to earlier images, near the teacher's.

Fang et al., "SEED: Self-supervised Distillation for Visual Representation"; a baseline of AttnDistill, on its projected
class token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from student.alignment.student_spec import StudentSpec, full
from student.alignment.student_taps import StudentTap
from student.losses.base import LossInputs
from student.losses.parts.projector import EMBEDDINGS, ClassToken
from student.losses.parts.queue import Queue, unit
from student.settings import ProjectorLossConfig
from student.targets.requirement import TargetRequirement
from student.targets.stored_target import StoredTarget


def cross_entropy(
    student: Tensor, teacher: Tensor, queue: Tensor, student_temperature: float, teacher_temperature: float
) -> Tensor:
    """−Σ_j p^t_j log p^s_j over the sample's own teacher embedding and the queue, mean over the batch.

    p^t = softmax(t·[t, queue] / τ_t), p^s = softmax(s·[t, queue] / τ_s).

    Args:
        student: unit vectors `[B, D]`.
        teacher: likewise.
        queue: unit vectors `[n, D]` of the teacher.
        student_temperature: τ_s.
        teacher_temperature: τ_t.
    """
    mine, theirs = (
        torch.cat([(vectors * teacher).sum(-1, keepdim=True), vectors @ queue.T], 1) for vectors in (student, teacher)
    )
    target = (theirs / teacher_temperature).softmax(1)
    return -(target * (mine / student_temperature).log_softmax(1)).sum(1).mean()


class Settings(ProjectorLossConfig):
    """Similarities to a queue of the teacher's embeddings and to the sample's own."""

    type: Literal["seed"] = "seed"
    queue: int = Field(65536, ge=1)
    student_temperature: float = Field(0.2, gt=0)
    teacher_temperature: float = Field(0.01, gt=0)


def reads(settings: Settings) -> frozenset[StudentTap]:
    """The student's final tokens."""
    return frozenset({"tokens"})


def need(name: str, settings: Settings, student: StudentSpec) -> TargetRequirement:
    """The teacher's class token, or the pooled features of one without."""
    return TargetRequirement(name, EMBEDDINGS, settings.teacher, settings.target)


class Method(nn.Module):
    """SEED as a term of the training loss."""

    def __init__(self, name: str, settings: Settings, student: StudentSpec, given: Sequence[StoredTarget]) -> None:
        super().__init__()
        self.settings = settings
        self.token = ClassToken(name, settings, student, given[0])
        self.queue = Queue(settings.queue, self.token.width)
        self.row = self.token.row

    def forward(self, step: LossInputs) -> Tensor:
        """The loss of one step; offers the teacher's embeddings to the queue."""
        mine, theirs = unit(self.token(step.student)), unit(full(step.targets[0]))
        self.queue.offer(theirs)
        taus = self.settings.student_temperature, self.settings.teacher_temperature
        return cross_entropy(mine, theirs, self.queue.held, *taus)
