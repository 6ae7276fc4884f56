"""CompRess: the student's similarities to earlier images, near the teacher's, with one queue or two.

Abbasi Koohpayegani, Tejankar and Pirsiavash, "CompRess: Self-Supervised Learning by Compressing Representations"; a
baseline of AttnDistill, on its projected class token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from student.alignment.student_spec import StudentSpec, full
from student.alignment.student_taps import StudentTap
from student.losses.base import LossInputs
from student.losses.parts.projector import EMBEDDINGS, ClassToken
from student.losses.parts.queue import Queue, unit
from student.settings import ProjectorLossConfig
from student.targets.requirement import TargetRequirement
from student.targets.stored_target import StoredTarget


def divergence(student: Tensor, teacher: Tensor, queues: tuple[Tensor, Tensor], temperature: float) -> Tensor:
    """KL(softmax(t·Q_t / τ) ‖ softmax(s·Q_s / τ)), mean over the batch; zero while the queues are empty.

    Args:
        student: unit vectors `[B, D]`.
        teacher: unit vectors `[B, D_t]`.
        queues: Q_s `[n, D]` and Q_t `[n, D_t]`, of the same images; one and the same with one queue.
        temperature: τ.
    """
    mine, theirs = (
        (student @ queues[0].T / temperature).log_softmax(1),
        (teacher @ queues[1].T / temperature).log_softmax(1),
    )
    return F.kl_div(mine, theirs, reduction="batchmean", log_target=True)


class Settings(ProjectorLossConfig):
    """Similarities to a queue of embeddings.

    queues: 1, the teacher's for both sides, or 2, one of each side's own.
    """

    type: Literal["compress"] = "compress"
    queue: int = Field(128000, ge=1)
    queues: Literal[1, 2] = 1
    temperature: float = Field(0.04, gt=0)


def reads(settings: Settings) -> frozenset[StudentTap]:
    """The student's final tokens."""
    return frozenset({"tokens"})


def need(name: str, settings: Settings, student: StudentSpec) -> TargetRequirement:
    """The teacher's class token, or the pooled features of one without."""
    return TargetRequirement(name, EMBEDDINGS, settings.teacher, settings.target)


class Method(nn.Module):
    """CompRess as a term of the training loss."""

    def __init__(self, name: str, settings: Settings, student: StudentSpec, given: Sequence[StoredTarget]) -> None:
        super().__init__()
        self.temperature = settings.temperature
        self.token = ClassToken(name, settings, student, given[0], free=settings.queues == 2)
        self.theirs = Queue(settings.queue, int(given[0].target.sample_shape[-1]))
        self.mine = Queue(settings.queue, self.token.width) if settings.queues == 2 else None
        self.row = self.token.row

    def forward(self, step: LossInputs) -> Tensor:
        """The loss of one step; offers the teacher's embeddings to the queue, and the student's to a second one."""
        mine, theirs = unit(self.token(step.student)), unit(full(step.targets[0]))
        self.theirs.offer(theirs)
        if self.mine is not None:
            self.mine.offer(mine)
        return divergence(mine, theirs, ((self.mine or self.theirs).held, self.theirs.held), self.temperature)
