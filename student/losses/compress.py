"""CompRess: the student's similarities to earlier images, near the teacher's, with one queue or two.

Abbasi Koohpayegani, Tejankar and Pirsiavash, "CompRess: Self-Supervised Learning by Compressing Representations"; a
baseline of AttnDistill, on its projected class token.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from precompute.taps import full
from student.alignment.student_spec import StudentSpec
from student.losses.base import Loss, LossInputs
from student.losses.parts.projector import EMBEDDINGS, ProjectedEmbedding
from student.losses.parts.queue import Queue, unit
from student.settings import ProjectorLossConfig
from student.targets.stored_target import Targets


def divergence(
    student: Float[Tensor, "B D"],
    teacher: Float[Tensor, "B D_t"],
    queues: tuple[Float[Tensor, "n D"], Float[Tensor, "n D_t"]],
    temperature: float,
) -> Float[Tensor, ""]:
    """KL(softmax(t·Q_t / τ) ‖ softmax(s·Q_s / τ)), mean over the batch; zero while the queues are empty.

    Args:
        student: unit vectors.
        teacher: unit vectors.
        queues: Q_s and Q_t, of the same images; one and the same with one queue.
        temperature: τ.
    """
    student_logs = (student @ queues[0].T / temperature).log_softmax(1)
    teacher_logs = (teacher @ queues[1].T / temperature).log_softmax(1)
    return F.kl_div(student_logs, teacher_logs, reduction="batchmean", log_target=True)


class CompRessConfig(ProjectorLossConfig):
    """Settings of CompRess.

    queue: entries of each queue.
    queues: 1, the teacher's for both sides, or 2, each side's own.
    """

    type: Literal["compress"] = "compress"
    queue: int = Field(128000, ge=1)
    queues: Literal[1, 2] = 1
    temperature: float = Field(0.04, gt=0)


class CompRessLoss(Loss[CompRessConfig]):
    """CompRess as a term of the training loss.

    Attributes:
        token: the student's embedding, projected; checkpoints know it by this name.
        theirs: queue of the teacher's embeddings; checkpoints know both queues by these names.
        mine: queue of the student's embeddings; None with one queue.
    """

    Config = CompRessConfig
    STUDENT_TAPS = frozenset({"embedding"})
    TARGET_TAPS = EMBEDDINGS

    def __init__(self, name: str, config: CompRessConfig, student: StudentSpec, targets: Targets) -> None:
        super().__init__(name, config, student, targets)
        (stored,) = targets
        self.token = ProjectedEmbedding(name, config, student, stored, own_width=config.queues == 2)
        self.theirs = Queue(config.queue, int(stored.target.sample_shape[-1]))
        self.mine = Queue(config.queue, self.token.width) if config.queues == 2 else None
        self.row = self.token.row

    def forward(self, inputs: LossInputs) -> Float[Tensor, ""]:
        """The loss of one step; offers the teacher's embeddings to the queue, and the student's to a second one."""
        student, teacher = unit(self.token(inputs.student_taps)), unit(full(inputs.targets[0]))
        self.theirs.offer(teacher)
        if self.mine is not None:
            self.mine.offer(student)
        queues = (self.mine or self.theirs).held, self.theirs.held
        return divergence(student, teacher, queues, self.config.temperature)
