"""Evaluation: top-1 and top-5 over shards, every sample once, on the evaluation view of the student's policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from storage.errors import UserError
from storage.policies import Policy
from student.stream import evaluation_batches


@dataclass(frozen=True)
class Score:
    """Accuracies in percent over a number of samples. top5 is None with fewer than five classes."""

    top1: float
    top5: float | None
    samples: int


@torch.no_grad()
def evaluate(
    model: nn.Module,
    urls: Sequence[str],
    policy: Policy,
    mean: Sequence[float],
    std: Sequence[float],
    batch: int = 256,
    device: torch.device | str = "cpu",
    advance: Callable[[int], None] = lambda samples: None,
) -> Score:
    """The accuracy of a classifier. Leaves the model in eval mode.

    Args:
        model: from `[B, 3, S, S]` to logits `[B, K]`.
        urls: labelled shards.
        policy: the evaluation view; its size is the model's input.
        mean: of the model's input.
        std: of the model's input.
        batch: about how many samples at a time.
        device: where the model is.
        advance: called with the number of samples done.

    Raises:
        UserError: a label that the model has no class for, a missing label, an image that cannot be decoded.
    """
    model.eval()
    right1 = right5 = samples = 0
    classes = 0
    for part in evaluation_batches(urls, policy, batch):
        there = part.to(device)
        logits = model(there.pixels(mean, std))
        classes = logits.shape[1]
        if int(there.labels.max()) >= classes:
            raise UserError(
                f"{urls[int(part.ids[int(part.labels.argmax()), 0])]}: there is a label {int(part.labels.max())}, the "
                f"student has classes 0 to {classes - 1}"
            )
        best = logits.topk(min(5, classes), 1).indices == there.labels[:, None]
        right1 += int(best[:, 0].sum())
        right5 += int(best.any(1).sum())
        samples += len(there.labels)
        advance(len(there.labels))
    top5 = round(100 * right5 / samples, 3) if classes > 5 else None
    return Score(round(100 * right1 / samples, 3), top5, samples)
