"""Cross-entropy with the labels: the loss of every baseline, and the class term of most methods."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from student.losses.base import Loss, LossInputs
from student.settings import LossConfig, Schedule, Weight


def cross_entropy(
    logits: Float[Tensor, "B K"],
    labels: Int64[Tensor, " B"],
    mix_labels: Int64[Tensor, " B"],
    mix_weights: Float[Tensor, " B"],
    smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """−Σ_k y_k log softmax(logits)_k, y = (1−w)·label + w·mix_label, smoothed towards 1/K; mean over the batch.

    It is linear in y, so the two labels' terms are mixed and no soft label is built.

    Args:
        logits: of the student.
        labels: of the images.
        mix_labels: labels of the images that were mixed in.
        mix_weights: w, share of the mixed-in image, 0 where nothing was mixed.
        smoothing: share of the mass that is spread evenly over all classes.
    """
    own, mixed_in = (
        F.cross_entropy(logits, y, label_smoothing=smoothing, reduction="none") for y in (labels, mix_labels)
    )
    return torch.lerp(own, mixed_in, mix_weights.to(own.dtype)).mean()


class CrossEntropyConfig(LossConfig):
    """Settings of the cross-entropy with the labels.

    `heads` is for students with a distillation token: the class head alone, or the mean over both heads; by default
    both, unless a `deit` loss trains the second one.
    """

    type: Literal["crossentropy"] = "crossentropy"
    weight: Weight = Schedule(start=1.0)
    smoothing: float = Field(0.0, ge=0, lt=1)
    heads: Literal["class", "both"] | None = None


class CrossEntropyLoss(Loss[CrossEntropyConfig]):
    """Cross-entropy as a term of the training loss; for a student with two heads by default the mean over both."""

    Config = CrossEntropyConfig
    STUDENT_TAPS = frozenset({"labels", "logits"})
    supports_pooling = True

    def forward(self, inputs: LossInputs) -> Float[Tensor, ""]:
        """The loss of one step."""
        heads = [inputs.logits]
        if self.config.heads != "class" and inputs.distillation_logits is not None:
            heads.append(inputs.distillation_logits)
        labels = inputs.labels, inputs.mix_labels, inputs.mix_weights
        return torch.stack([cross_entropy(logits, *labels, self.config.smoothing) for logits in heads]).mean()
