"""Cross-entropy with the labels: the loss of every baseline, and the class term of most methods."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from storage.records import Record
from student import config
from student.align import Row, Shape
from student.losses import Step


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


def need(name: str, settings: config.CrossEntropy, student: Shape | None) -> None:
    """Labels are all it takes."""
    return


def align(name: str, settings: config.CrossEntropy, student: Shape | None, manifest: Record | None) -> Row | None:
    """Nothing of a teacher meets the student."""
    return None


class Method(nn.Module):
    """Cross-entropy as a term of the training loss."""

    def __init__(self, settings: config.CrossEntropy, student: Shape | None, manifest: Record | None) -> None:
        super().__init__()
        self.smoothing = settings.smoothing

    def forward(self, step: Step) -> Tensor:
        """The loss of one step."""
        return cross_entropy(step.logits, step.labels, step.others, step.shares, self.smoothing)
