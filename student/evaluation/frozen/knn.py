"""k-NN on frozen features, as DINO has it: the k nearest by cosine vote for their classes with exp(similarity/0.07)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from student.evaluation.class_metrics import label_ranks
from student.evaluation.frozen.features import Features

NEIGHBOURS = (10, 20, 50, 100, 200)
TEMPERATURE = 0.07
CHUNK = 1024  # samples that are asked for at a time


def votes(bank: Features, values: Tensor, ks: Sequence[int], classes: int) -> Iterator[dict[int, Tensor]]:
    """k -> the votes that classes get, f64 `[n, K]` of each chunk of samples; 0 for a class without one.

    Args:
        bank: labelled features.
        values: f32 `[N, D]`: of the samples that are asked for.
        ks: how many neighbours vote, for each answer; at most as many as the bank has.
        classes: K.
    """
    keys = F.normalize(bank.values, dim=1)
    for part in torch.split(values, CHUNK):
        near, which = (F.normalize(part, dim=1) @ keys.T).topk(min(max(ks), len(keys)), 1)  # the nearest first
        weights, labels = (near.double() / TEMPERATURE).exp(), bank.labels[which]
        nothing = weights.new_zeros(len(part), classes)
        yield {k: nothing.scatter_add(1, labels[:, :k], weights[:, :k]) for k in ks}


def places(bank: Features, asked: Features, ks: Sequence[int], classes: int) -> dict[int, Tensor]:
    """k -> how many classes come before the right one, int64 `[N]`; K where it got no vote: it is never among five.

    Args:
        bank: labelled features.
        asked: features of the samples that are evaluated, and their labels.
        ks: how many neighbours vote, for each answer.
        classes: K.
    """
    found: dict[int, list[Tensor]] = {k: [] for k in ks}
    for by_k, labels in zip(votes(bank, asked.values, ks, classes), torch.split(asked.labels, CHUNK), strict=True):
        for k, got in by_k.items():
            own = got.gather(1, labels[:, None])[:, 0]
            found[k].append(torch.where(own > 0, label_ranks(got, labels), classes))
    return {k: torch.cat(parts) for k, parts in found.items()}


def usable(samples: int, wanted: Sequence[int] = NEIGHBOURS) -> list[int]:
    """The k that a bank of so many samples can answer; its size where all are larger."""
    return [k for k in wanted if k <= samples] or [samples]
