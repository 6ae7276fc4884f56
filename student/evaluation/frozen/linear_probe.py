"""A linear probe on frozen features: DINO's SGD, at the learning rate that is best on held-out training samples.

Momentum 0.9, no weight decay, cosine schedule to zero over 100 epochs; a rate is for a batch of 256 and grows with the
batch. Features are computed once, on the evaluation view: no augmentation, which DINO's probe has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from storage.errors import UserError, setting
from storage.shards.stratify import stratified_sample
from student.evaluation.frozen.features import Features

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)
EPOCHS, BATCH = 100, 256
HELD_OUT = 0.2  # of the labeled samples


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeTrial:
    """What one learning rate gave on held-out training samples: percent right, and mean cross-entropy."""

    lr: float
    top1: float
    loss: float


def heads(
    features: Features,
    num_classes: int,
    rates: Sequence[float],
    *,
    seed: int = 0,
    epochs: int = EPOCHS,
    advance: Callable[[int], None] = lambda _epochs: None,
) -> tuple[Tensor, Tensor]:
    """Linear classifiers, one a learning rate, trained side by side from one start on the same batches.

    Args:
        features: of the samples to fit.
        num_classes: K.
        rates: R learning rates for a batch of 256.
        seed: of the start and of the batches.
        epochs: over the features.
        advance: called with 1 after each epoch.

    Returns:
        Weights f32 `[R, K, D]` and biases f32 `[R, K]`.
    """
    generator = torch.Generator().manual_seed(seed)
    device, (count, width) = features.values.device, features.values.shape
    start = torch.randn(num_classes, width, generator=generator) * 0.01
    weight = start.expand(len(rates), -1, -1).contiguous().to(device)
    bias = torch.zeros(len(rates), num_classes, device=device)
    velocity = torch.zeros_like(weight), torch.zeros_like(bias)
    batch = min(BATCH, count)
    scaled = torch.tensor(rates, device=device) * batch / 256
    for epoch in range(epochs):
        step = scaled * (1 + math.cos(math.pi * epoch / epochs)) / 2
        for rows in torch.split(torch.randperm(count, generator=generator).to(device), batch):
            x, y = features.values[rows], F.one_hot(features.labels[rows], num_classes).float()
            error = (_logits(weight, bias, x).softmax(-1) - y) / len(rows)  # the gradient of the mean cross-entropy
            velocity[0].mul_(0.9).add_(error.transpose(1, 2) @ x)
            velocity[1].mul_(0.9).add_(error.sum(1))
            weight -= step[:, None, None] * velocity[0]
            bias -= step[:, None] * velocity[1]
        advance(1)
    return weight, bias


def _logits(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """`[R, n, K]` of R classifiers for features `[n, D]`."""
    return x @ weight.transpose(1, 2) + bias[:, None]


def logits_of(head: tuple[Tensor, Tensor], values: Tensor) -> Tensor:
    """`[n, K]` of one classifier of `heads` for features `[n, D]`."""
    return values @ head[0][0].T + head[1][0]


def search_learning_rate(
    features: Features,
    num_classes: int,
    rates: Sequence[float] = RATES,
    *,
    seed: int = 0,
    epochs: int = EPOCHS,
    advance: Callable[[int], None] = lambda _epochs: None,
) -> list[ProbeTrial]:
    """What each rate gives on a class-balanced fifth of the samples that it was not fitted on, best first.

    Of equally many right ones the smaller loss is better.

    Raises:
        UserError: no class has two samples, so that none can be held out.
    """
    labels = features.labels.tolist()
    held_out = torch.tensor(sorted(stratified_sample(labels, HELD_OUT, seed, "held out", 1)), dtype=torch.int64)
    if not len(held_out):
        message = "no class has two labeled samples, so none can be held out to choose the learning rate by"
        raise UserError(message, hint=f"Give a learning rate, such as DINO's: {setting('lr', 0.001)}")
    fitted = torch.ones(len(labels), dtype=torch.bool)
    fitted[held_out] = False
    training = Features(values=features.values[fitted], labels=features.labels[fitted])
    weight, bias = heads(training, num_classes, rates, seed=seed, epochs=epochs, advance=advance)
    trials, truth = [], features.labels[held_out]
    for lr, logits in zip(rates, _logits(weight, bias, features.values[held_out]), strict=True):
        right, loss = float((logits.argmax(1) == truth).float().mean()), float(F.cross_entropy(logits, truth))
        trial = ProbeTrial(lr=lr, top1=round(100 * right, 3), loss=loss)
        trials.append(trial if math.isfinite(loss) else replace(trial, top1=0.0, loss=math.inf))
    return sorted(trials, key=lambda trial: (-trial.top1, trial.loss))
