"""Evaluation: top-1 and top-5 over shards, every sample once, on the evaluation view of the student's policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from storage.errors import UserError
from storage.policies import Policy
from storage.shards import cached_index, require_labels
from student.order import Segment
from student.reader import BlockReader, Part, Source, join
from student.stream import Batch


@dataclass(frozen=True)
class Score:
    """Accuracies in percent over a number of samples. top5 is None with five classes or fewer: it would say nothing."""

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


def evaluation_batches(urls: Sequence[str], policy: Policy, batch: int) -> Iterator[Batch]:
    """Every sample of labelled shards once, in order, in the one view of a policy without chance."""
    for shard, url in enumerate(urls):
        index = cached_index(url)
        require_labels(url, index)
        reader = BlockReader(Source((url,), (index.id,), policy))
        held: list[Part] = []
        for number in range(index.blocks):
            arrays, targets = reader.read(Segment(0, number, np.array(index.block(number))), 0)
            arrays["ids"][:, 0] = shard
            held.append((arrays, targets))
            if sum(len(part[0]["labels"]) for part in held) >= batch or number == index.blocks - 1:
                joined, _ = join(held)
                tensors = {name: torch.from_numpy(array) for name, array in joined.items()}
                yield Batch(**tensors)  # type: ignore[arg-type]
                held = []
