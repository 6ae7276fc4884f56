"""Evaluation: top-1 and top-5 over shards, every sample once, on the evaluation view of the student's policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from student.attention_copy.inference import attached_to, inject_attention
from student.data.source import Shards, opened
from student.evaluation.batches import evaluation_batches, require_known_labels
from student.evaluation.class_metrics import label_ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from storage.shards.shard import Shard
    from storage.views.policy import Policy
    from student.data.batch import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How many samples of shards a classifier gets right.

    Attributes:
        top1: accuracy in percent.
        top5: in percent; None with five classes or fewer.
        samples: how many were counted.
    """

    top1: float
    top5: float | None
    samples: int


def tell_of_shared(train: Sequence[str], val_shards: Sequence[Shard], say: Callable[[str], None]) -> None:
    """Say which validation shards are trained on too, whatever they are called: what they measure is worth nothing.

    Args:
        train: ids of the training shards.
        val_shards: the validation shards.
        say: called with a line, if there are any.
    """
    contents = {shard.rpartition("-")[2] for shard in train}
    shared = [shard.url for shard in val_shards if shard.id.rpartition("-")[2] in contents]
    if shared:
        say(f"warning: {', '.join(shared)}: trained on too, so accuracy on it says nothing about other images")


@torch.no_grad()
def evaluate(
    model: nn.Module,
    shards: Shards,
    policy: Policy,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    advance: Callable[[int], None] = lambda _samples: None,
    rank: int = 0,
    world_size: int = 1,
    max_blocks: int | None = None,
) -> Score:
    """The accuracy of a classifier. Leaves the model in eval mode.

    A student that copies attention gets it from its hooks' source (see student/attention_copy/inference.py).

    With several ranks each takes its share of the blocks and all get the accuracy over all samples, each counted once.

    Args:
        model: from `[B, 3, S, S]` to logits `[B, K]`.
        shards: patterns of labeled shards, or shards that are open already.
        policy: the evaluation view; its size is the model's input.
        mean: of the model's input.
        std: of the model's input.
        batch_size: about how many samples at a time.
        device: where the model is.
        advance: called with the number of samples done.
        rank: of this process in `torch.distributed`.
        world_size: how many processes evaluate together; all of them call this.
        max_blocks: blocks of all shards that are looked at; None for all.

    Raises:
        UserError: a label that the model has no class for, a missing label, an image that cannot be decoded.
    """
    evaluated, stored = list(opened(shards, None)), attached_to(model)
    batches = evaluation_batches(
        evaluated, policy, batch_size, rank=rank, world_size=world_size, max_blocks=max_blocks, stored=stored
    )
    counts = count(model, batches, evaluated, mean, std, device=device, advance=advance)
    if world_size > 1:
        dist.all_reduce(counts)
    right1, right5, samples, few = counts.tolist()
    top5 = None if few else round(100 * right5 / samples, 3)
    return Score(top1=round(100 * right1 / samples, 3), top5=top5, samples=samples)


@torch.no_grad()
def count(
    model: nn.Module,
    batches: Iterable[Batch],
    shards: Sequence[Shard],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    device: torch.device | str = "cpu",
    advance: Callable[[int], None] = lambda _samples: None,
) -> Tensor:
    """Counts over batches: correct in first place, correct among five, samples, and batches of at most five classes.

    Counts of several ranks add up. int64 `[4]`; arguments as for `evaluate`.
    """
    model.eval()
    counts = torch.zeros(4, dtype=torch.int64)
    for on_cpu in batches:
        batch = on_cpu.to(device)
        with inject_attention(model, batch):
            logits = model(batch.pixels(mean, std))
        num_classes = logits.shape[1]
        require_known_labels(batch, num_classes, shards, "the student")
        ranks = label_ranks(logits, batch.labels)
        counts += torch.tensor([int((ranks < 1).sum()), int((ranks < 5).sum()), len(ranks), num_classes <= 5])
        advance(len(ranks))
    return counts.to(device)
