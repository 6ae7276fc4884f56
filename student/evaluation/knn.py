"""k-NN on frozen features, as DINO has it: the k nearest by cosine vote for their classes with exp(similarity/0.07)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from student.evaluation.accuracy import places_of
from student.evaluation.features import Features

NEIGHBOURS = (10, 20, 50, 100, 200)
TEMPERATURE = 0.07
CHUNK = 1024  # samples that are asked for at a time


def votes(bank: Features, values: Tensor, k: int, classes: int) -> Iterator[Tensor]:
    """The votes that classes get, f64 `[n, K]` of each chunk of samples; 0 for a class without one.

    Args:
        bank: labelled features.
        values: f32 `[N, D]`: of the samples that are asked for.
        k: how many neighbours vote; at most as many as the bank has.
        classes: K.
    """
    keys = F.normalize(bank.values, dim=1)
    for part in torch.split(values, CHUNK):
        near, which = (F.normalize(part, dim=1) @ keys.T).topk(min(k, len(keys)), 1)
        weights = (near.double() / TEMPERATURE).exp()
        yield weights.new_zeros(len(part), classes).scatter_add_(1, bank.labels[which], weights)


def places(bank: Features, asked: Features, k: int, classes: int) -> Tensor:
    """How many classes come before the right one, int64 `[N]`; K where it got no vote, so that it is never among five.

    Args:
        bank: labelled features.
        asked: features of the samples that are evaluated, and their labels.
        k: how many neighbours vote.
        classes: K.
    """
    found = []
    for got, labels in zip(votes(bank, asked.values, k, classes), torch.split(asked.labels, CHUNK), strict=True):
        own = got.gather(1, labels[:, None])[:, 0]
        found.append(torch.where(own > 0, places_of(got, labels), classes))
    return torch.cat(found)


def usable(samples: int, wanted: Sequence[int] = NEIGHBOURS) -> list[int]:
    """The k that a bank of so many samples can answer; its size where all are larger."""
    return [k for k in wanted if k <= samples] or [samples]
