"""What a loss is, and what it sees of a training step."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from student.alignment.student_taps import StudentTaps


@dataclass(frozen=True)
class LossInputs:
    """What a loss sees of one training step.

    Attributes:
        logits: of the student's class head, `[B, K]`; its pooled features for a student without one.
        labels: int64 `[B]`; −1 where the shards have none.
        others: int64 `[B]`, labels of the images that these were mixed with.
        shares: f32 `[B]`, the others' share.
        distilled: logits of the distillation head, `[B, K]`; None for a student without one.
        seen: what else the losses read of the student in this step; None where none does.
        targets: the loss's own targets, decoded, f32 `[B, …]`; empty where it reads none.
        notes: a loss may leave scalars for people here, such as agreement with the teacher.
    """

    logits: Tensor
    labels: Tensor
    others: Tensor
    shares: Tensor
    distilled: Tensor | None = None
    seen: StudentTaps | None = None
    targets: tuple[Tensor, ...] = ()
    notes: dict[str, Tensor] = field(default_factory=dict)

    @property
    def student(self) -> StudentTaps:
        """What is read of the student beside its logits."""
        assert self.seen is not None
        return self.seen
