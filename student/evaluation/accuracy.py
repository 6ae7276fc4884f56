"""Evaluation: top-1 and top-5 over shards, every sample once, on the evaluation view of the student's policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from storage.errors import UserError
from storage.shards.index import cached_index
from storage.views.policy import Policy
from student.attention_copy.inference import attached_to, inject_attention
from student.evaluation.batches import evaluation_batches
from student.evaluation.class_metrics import label_ranks


@dataclass(frozen=True)
class Score:
    """Accuracies in percent over a number of samples. top5 is None with five classes or fewer: it would say nothing."""

    top1: float
    top5: float | None
    samples: int


def tell_of_shared(train: Sequence[str], val_urls: Sequence[str], say: Callable[[str], None]) -> None:
    """Say which validation shards are trained on too, whatever they are called: what they measure is worth nothing.

    Args:
        train: ids of the training shards.
        val_urls: the validation shards.
        say: called with a line, if there are any.
    """
    contents = {shard.rpartition("-")[2] for shard in train}
    shared = [url for url in val_urls if cached_index(url).id.rpartition("-")[2] in contents]
    if shared:
        say(f"warning: {', '.join(shared)}: trained on too, so accuracy on it says nothing about other images")


@torch.no_grad()
def evaluate(
    model: nn.Module,
    urls: Sequence[str],
    policy: Policy,
    mean: Sequence[float],
    std: Sequence[float],
    batch: int = 256,
    device: torch.device | str = "cpu",
    advance: Callable[[int], None] = lambda _samples: None,
    rank: int = 0,
    ranks: int = 1,
    most: int | None = None,
) -> Score:
    """The accuracy of a classifier. Leaves the model in eval mode.

    A student that copies attention gets it from its lender (see student/attention_copy/inference.py).

    With several ranks each takes its share of the blocks and all get the accuracy over all samples, each counted once.

    Args:
        model: from `[B, 3, S, S]` to logits `[B, K]`.
        urls: labelled shards.
        policy: the evaluation view; its size is the model's input.
        mean: of the model's input.
        std: of the model's input.
        batch: about how many samples at a time.
        device: where the model is.
        advance: called with the number of samples done.
        rank: of this process in `torch.distributed`.
        ranks: how many processes evaluate together; all of them call this.
        most: blocks of all shards that are looked at; None for all.

    Raises:
        UserError: a label that the model has no class for, a missing label, an image that cannot be decoded.
    """
    counts = count(model, urls, policy, mean, std, batch, device, advance, rank, ranks, most)
    if ranks > 1:
        dist.all_reduce(counts)
    right1, right5, samples, few = (int(n) for n in counts)
    top5 = None if few else round(100 * right5 / samples, 3)
    return Score(round(100 * right1 / samples, 3), top5, samples)


@torch.no_grad()
def count(
    model: nn.Module,
    urls: Sequence[str],
    policy: Policy,
    mean: Sequence[float],
    std: Sequence[float],
    batch: int,
    device: torch.device | str,
    advance: Callable[[int], None],
    rank: int,
    ranks: int,
    most: int | None = None,
) -> Tensor:
    """What one rank counts: right at the first, right among five, samples, and batches of five classes or fewer.

    Arguments as for `evaluate`; the sums over the ranks are what counts. int64 `[4]`.
    """
    model.eval()
    right1 = right5 = samples = few = 0
    for part in evaluation_batches(urls, policy, batch, rank, ranks, most, stored=attached_to(model)):
        there = part.to(device)
        with inject_attention(model, there):
            logits = model(there.pixels(mean, std))
        classes = logits.shape[1]
        if int(there.labels.max()) >= classes:
            raise UserError(
                f"{urls[int(part.ids[int(part.labels.argmax()), 0])]}: there is a label {int(part.labels.max())}, the "
                f"student has classes 0 to {classes - 1}"
            )
        places = label_ranks(logits, there.labels)
        right1 += int((places == 0).sum())
        right5 += int((places < 5).sum())
        samples += len(there.labels)
        few += classes <= 5
        advance(len(there.labels))
    return torch.tensor([right1, right5, samples, few], device=device)
