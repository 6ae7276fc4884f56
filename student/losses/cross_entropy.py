"""Cross-entropy with the labels: the loss of every baseline, and the class term of most methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from student.alignment.student_spec import StudentSpec
from student.alignment.student_taps import StudentTap
from student.losses.base import LossInputs
from student.settings import LossConfig, Schedule, Weight
from student.targets.stored_target import StoredTarget


def cross_entropy(logits: Tensor, labels: Tensor, others: Tensor, shares: Tensor, smoothing: float = 0.0) -> Tensor:
    """−Σ_k y_k log softmax(logits)_k, y = (1−s)·label + s·other, smoothed towards 1/K; mean over the batch.

    It is linear in y, so the two labels' terms are mixed and no soft label is built.

    Args:
        logits: `[B, K]`.
        labels: int64 `[B]`.
        others: int64 `[B]`, labels of the mixing partners.
        shares: f32 `[B]`, s: the partners' shares, 0 where nothing was mixed.
        smoothing: share of the mass that is spread evenly over all classes.
    """
    own, other = (F.cross_entropy(logits, y, label_smoothing=smoothing, reduction="none") for y in (labels, others))
    return torch.lerp(own, other, shares.to(own.dtype)).mean()


POOLED = True


class Settings(LossConfig):
    """Cross-entropy with the labels.

    `heads` is for students with a distillation token: the class head alone, or the mean over both heads; by default
    both, unless a `deit` loss trains the second one.
    """

    type: Literal["crossentropy"] = "crossentropy"
    weight: Weight = Schedule(start=1.0)
    smoothing: float = Field(0.0, ge=0, lt=1)
    heads: Literal["class", "both"] | None = None


def reads(settings: Settings) -> frozenset[StudentTap]:
    """Labels and logits."""
    return frozenset({"labels", "logits"})


def need(name: str, settings: Settings, student: StudentSpec) -> None:
    """Labels are all it takes."""
    return


class Method(nn.Module):
    """Cross-entropy as a term of the training loss; for a student with two heads the mean over both, unless told."""

    row = None

    def __init__(self, name: str, settings: Settings, student: StudentSpec, given: Sequence[StoredTarget]) -> None:
        super().__init__()
        self.smoothing, self.both = settings.smoothing, settings.heads != "class"

    def forward(self, step: LossInputs) -> Tensor:
        """The loss of one step."""
        heads = [step.logits, step.distilled] if self.both else [step.logits]
        losses = [
            cross_entropy(logits, step.labels, step.others, step.shares, self.smoothing)
            for logits in heads
            if logits is not None
        ]
        return torch.stack(losses).mean()
