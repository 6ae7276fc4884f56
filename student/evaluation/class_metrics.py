"""What is reported of a set: top-1 and top-5, of each class, and of classes by their number of training images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

PARTS = ("many", "medium", "few")

BOUNDS = (20, 100)  # Liu et al. 2019: few-shot classes have fewer than 20 training images, many-shot ones more than 100


def class_metrics(
    labels: Tensor,
    places: Tensor,
    classes: int,
    names: Sequence[str] | None = None,
    images: Mapping[int, int] | None = None,
    bounds: tuple[int, int] = BOUNDS,
) -> dict[str, Any]:
    """Accuracies in percent, as plain data.

    Args:
        labels: int64 `[N]`.
        places: int64 `[N]`: how many classes come before the right one.
        classes: K; with five or fewer there is no top-5, it would say nothing.
        names: of the classes.
        images: label -> number of its training images; then many-, medium- and few-shot classes are told apart.
        bounds: (low, high): medium-shot classes have from `low` to `high` training images.
    """
    found: dict[str, Any] = {
        "top1": _percent(places < 1),
        "top5": None if classes <= 5 else _percent(places < 5),
        "samples": len(labels),
    }
    found["classes"] = [
        {
            "class": names[n] if names else str(n),
            "samples": int((mine := labels == n).sum()),
            "top1": _percent(places[mine] < 1),
        }
        for n in sorted(set(labels.tolist()))
    ]
    if images is not None:
        low, high = bounds
        count = torch.tensor([images.get(n, 0) for n in range(classes)])
        masks = {"many": count > high, "medium": (count >= low) & (count <= high), "few": count < low}
        found["bounds"] = list(bounds)
        for name, mask in masks.items():
            mine = mask[labels]
            found[name] = {
                "classes": int(mask.sum()), "samples": int(mine.sum()),
                "top1": _percent(places[mine] < 1) if mine.any() else None,
            }  # fmt: skip
    return found


def _percent(right: Tensor) -> float:
    return round(100 * int(right.sum()) / len(right), 3)


def label_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """How many classes come before the right one: 0 where it is the first. int64 `[B]`.

    Of classes with one score the first counts as the larger. A score that is no number beats nothing, and is beaten
    by all.

    Args:
        scores: `[B, K]`.
        labels: int64 `[B]`.
    """
    own = scores.gather(1, labels[:, None])
    later = torch.arange(scores.shape[1], device=scores.device) > labels[:, None]
    beaten = (scores < own) | ((scores == own) & later)
    return scores.shape[1] - 1 - beaten.sum(1)
