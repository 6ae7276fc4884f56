"""A linear head on stored features: multinomial logistic regression with mixed labels and an L2 term, by L-BFGS.

For features x `[N, D]` standardized to z, labels y and o of an image and of its mixing partner, and its share s of it:

    loss = 1/N Σ −[(1 − s) log p(y | z) + s log p(o | z)] + λ/2 ‖W‖²,   p = softmax(W z + b)

Standardizing is folded into weight and bias afterward, so that the head acts on x itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from storage.rng import generator

if TYPE_CHECKING:
    from collections.abc import Callable

CHUNK = 4096  # samples that are looked at together
LBFGS: dict[str, Any] = {"max_iter": 300, "history_size": 10, "tolerance_grad": 1e-6, "tolerance_change": 1e-10}
HELD_OUT = 0.2  # of the blocks, at least one
STRENGTHS = (1.0, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 1e-4, 1e-5)  # λ that are tried, strongest first
FLAT = 1e-3  # of a feature's mean: one that moves less than this is rounding, and not blown up to a deviation of one


@dataclass(frozen=True)
class Examples:
    """What a head is fitted on.

    Attributes:
        features: f32 `[N, D]`.
        labels: int64 `[N]`.
        mix_labels: int64 `[N]`: labels of the images that were mixed in; equal to `labels` where nothing was.
        mix_weights: f32 `[N]`: share of the mixed-in image in each label.
        blocks: int64 `[N]`: the block that each is of, from 0; images are mixed within their block alone.
    """

    features: Tensor
    labels: Tensor
    mix_labels: Tensor
    mix_weights: Tensor
    blocks: Tensor

    def losses(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Cross-entropy of these samples' logits `[n, K]` with their mixed labels, `[n]`."""
        log = logits.log_softmax(1)
        weights = self.mix_weights[rows].to(log)
        own, mixed_in = (log.gather(1, labels[rows, None])[:, 0] for labels in (self.labels, self.mix_labels))
        return -((1 - weights) * own + weights * mixed_in)


@dataclass(frozen=True)
class Head:
    """Logits = weight · x + bias; f64 `[K, D]` and `[K]`."""

    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """F64 `[n, K]` of features `[n, D]`."""
        return features.double() @ self.weight.T + self.bias


@dataclass(frozen=True)
class StrengthTrial:
    """What one λ gave on the samples that were held out: mean loss, and percent of main labels that were right."""

    l2: float
    loss: float
    top1: float


def fit(examples: Examples, rows: Tensor, classes: int, l2: float, start: Head | None = None) -> Head:
    """The head of least loss on some of the samples; the same on every call.

    Args:
        examples: all samples.
        rows: int64 `[n]`, those to fit.
        classes: K.
        l2: λ.
        start: a head to begin with, such as the one for another λ.
    """
    mean, deviation = _moments(examples.features, rows)
    width = examples.features.shape[1]
    weight, bias = mean.new_zeros(classes, width), mean.new_zeros(classes)
    if start is not None:
        weight, bias = start.weight * deviation, start.bias + start.weight @ mean
    parameters = [weight.requires_grad_(True), bias.requires_grad_(True)]
    optimizer = torch.optim.LBFGS(parameters, line_search_fn="strong_wolfe", **LBFGS)

    def objective() -> float:
        optimizer.zero_grad()
        total = l2 / 2 * weight.square().sum()
        total.backward()  # type: ignore[no-untyped-call]
        value = total.item()
        for part in torch.split(rows, CHUNK):
            z = (examples.features[part].double() - mean) / deviation
            loss = examples.losses(z @ weight.T + bias, part).sum() / len(rows)
            loss.backward()  # type: ignore[no-untyped-call]
            value += loss.item()
        return value

    optimizer.step(objective)  # type: ignore[no-untyped-call]
    folded, free = weight.detach() / deviation, bias.detach()
    return Head(folded, free - free.mean() - folded @ mean)  # p is the same whatever is added to all biases


def _moments(features: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each feature over some samples, f64 `[D]`; no deviation is zero."""
    mean = torch.zeros(features.shape[1], dtype=torch.float64)
    for part in torch.split(rows, CHUNK):
        mean += features[part].double().sum(0) / len(rows)
    variance = torch.zeros_like(mean)
    for part in torch.split(rows, CHUNK):
        variance += (features[part].double() - mean).square().sum(0) / len(rows)
    deviation = torch.maximum(variance.sqrt(), FLAT * mean.abs())
    return mean, torch.where(deviation > 0, deviation, 1)


def held_out(blocks: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to fit and rows to judge by: whole blocks, so that no image is on both sides, nor one that it is mixed with.

    Args:
        blocks: int64 `[N]`, the block that each sample is of.
        seed: of the choice.
    """
    numbers = torch.unique(blocks)
    count = max(1, round(HELD_OUT * len(numbers)))
    order = torch.from_numpy(generator("held out", seed).permutation(len(numbers)))
    away = torch.isin(blocks, numbers[order[:count]])
    return (~away).nonzero()[:, 0], away.nonzero()[:, 0]


def judged(examples: Examples, rows: Tensor, head: Head, l2: float) -> StrengthTrial:
    """How good a head is on some of the samples."""
    loss, right = 0.0, 0
    for part in torch.split(rows, CHUNK):
        logits = head.logits(examples.features[part])
        loss += float(examples.losses(logits, part).sum()) / len(rows)
        main = torch.where(examples.mix_weights[part] > 0.5, examples.mix_labels[part], examples.labels[part])
        right += int((logits.argmax(1) == main).sum())
    return StrengthTrial(l2, loss, round(100 * right / len(rows), 3))


def search_strength(
    examples: Examples, classes: int, seed: int, advance: Callable[[int], None] = lambda _steps: None
) -> list[StrengthTrial]:
    """What each λ gives on blocks that it was not fitted on, best first; of equally good ones the stronger first.

    Each begins where the one before ended. After two that only made it worse, weaker ones are not tried.

    Args:
        examples: of two blocks or more.
        classes: K.
        seed: of the choice of blocks.
        advance: called with 1 after each.
    """
    rows, away = held_out(examples.blocks, seed)
    trials: list[StrengthTrial] = []
    head: Head | None = None
    for l2 in STRENGTHS:
        head = fit(examples, rows, classes, l2, head)
        trials.append(judged(examples, away, head, l2))
        advance(1)
        if len(trials) > 2 and trials[-1].loss > trials[-2].loss > trials[-3].loss:
            break
    return sorted(trials, key=lambda trial: (trial.loss, -trial.l2))
