"""k-NN on frozen features, as DINO has it: the k nearest by cosine vote for their classes with exp(similarity/0.07)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from student.evaluation.class_metrics import label_ranks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from student.evaluation.frozen.features import Features

NEIGHBORS = (10, 20, 50, 100, 200)
TEMPERATURE = 0.07
CHUNK = 1024  # samples that are asked for at a time


def votes(bank: Features, values: Tensor, ks: Sequence[int], num_classes: int) -> Iterator[dict[int, Tensor]]:
    """k -> the votes that classes get, f64 `[n, K]` of each chunk of samples; 0 for a class without one.

    Args:
        bank: labeled features.
        values: f32 `[N, D]`: of the samples that are asked for.
        ks: how many neighbors vote, for each answer; at most as many as the bank has.
        num_classes: K.
    """
    keys = F.normalize(bank.values, dim=1)
    for part in torch.split(values, CHUNK):
        nearest = min(max(ks), len(keys))
        similarities, indices = (F.normalize(part, dim=1) @ keys.T).topk(nearest, 1)  # the nearest first
        weights, labels = (similarities.double() / TEMPERATURE).exp(), bank.labels[indices]
        no_votes = weights.new_zeros(len(part), num_classes)
        yield {k: no_votes.scatter_add(1, labels[:, :k], weights[:, :k]) for k in ks}


def knn_ranks(bank: Features, evaluated: Features, ks: Sequence[int], num_classes: int) -> dict[int, Tensor]:
    """k -> how many classes come before the right one, int64 `[N]`; K where it got no vote: it is never among five.

    Args:
        bank: labeled features.
        evaluated: features and labels of the samples that are evaluated.
        ks: how many neighbors vote, for each answer.
        num_classes: K.
    """
    ranks: dict[int, list[Tensor]] = {k: [] for k in ks}
    chunks = votes(bank, evaluated.values, ks, num_classes)
    for votes_by_k, labels in zip(chunks, torch.split(evaluated.labels, CHUNK), strict=True):
        for k, class_votes in votes_by_k.items():
            label_votes = class_votes.gather(1, labels[:, None])[:, 0]
            ranks[k].append(torch.where(label_votes > 0, label_ranks(class_votes, labels), num_classes))
    return {k: torch.cat(parts) for k, parts in ranks.items()}


def usable(samples: int) -> list[int]:
    """The k that a bank of so many samples can answer; its size where all are larger."""
    return [k for k in NEIGHBORS if k <= samples] or [samples]
