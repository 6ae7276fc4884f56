"""What is reported of a set: top-1 and top-5, of each class, and of classes by their number of training images."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

BOUNDS = (20, 100)  # Liu et al. 2019: few-shot classes have fewer than 20 training images, many-shot ones more than 100


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassAccuracy:
    """Top-1 accuracy of one class, in percent."""

    name: str
    samples: int
    top1: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ShotAccuracy:
    """Top-1 accuracy of classes with a similar number of training images, in percent; None without samples."""

    classes: int
    samples: int
    top1: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShotMetrics:
    """Accuracy of many-, medium- and few-shot classes; medium ones have from `bounds[0]` to `bounds[1]` images."""

    bounds: tuple[int, int]
    many: ShotAccuracy
    medium: ShotAccuracy
    few: ShotAccuracy


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassMetrics:
    """Accuracies over a set, in percent.

    Attributes:
        top1: of all samples.
        top5: of all samples; None with five classes or fewer: it would say nothing.
        samples: how many were evaluated.
        classes: those that the set has samples of, in the order of their numbers.
        shots: by the number of training images, where that is known.
    """

    top1: float
    top5: float | None
    samples: int
    classes: tuple[ClassAccuracy, ...]
    shots: ShotMetrics | None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        classes = [{"class": one.name, "samples": one.samples, "top1": one.top1} for one in self.classes]
        shots = asdict(self.shots) if self.shots else {}
        return {"top1": self.top1, "top5": self.top5, "samples": self.samples, "classes": classes, **shots}


def class_metrics(
    labels: Tensor,
    ranks: Tensor,
    num_classes: int,
    *,
    names: Sequence[str] | None = None,
    train_images: Mapping[int, int] | None = None,
    bounds: tuple[int, int] = BOUNDS,
) -> ClassMetrics:
    """Accuracies over a set.

    Args:
        labels: int64 `[N]`.
        ranks: int64 `[N]`, as `label_ranks` gives them.
        num_classes: K.
        names: of the classes.
        train_images: label -> number of its training images; then many-, medium- and few-shot classes are told apart.
        bounds: (low, high): medium-shot classes have from `low` to `high` training images.
    """
    masks = {n: labels == n for n in set(labels.tolist())}
    shots = None
    if train_images is not None:
        shots = _shots(labels, ranks, torch.tensor([train_images.get(n, 0) for n in range(num_classes)]), bounds)
    classes = tuple(
        ClassAccuracy(name=names[n] if names else str(n), samples=int(mask.sum()), top1=_percent(ranks[mask] < 1))
        for n, mask in masks.items()
    )
    top1, top5 = _percent(ranks < 1), _percent(ranks < 5) if num_classes > 5 else None
    return ClassMetrics(top1=top1, top5=top5, samples=len(labels), classes=classes, shots=shots)


def _shots(labels: Tensor, ranks: Tensor, images: Tensor, bounds: tuple[int, int]) -> ShotMetrics:
    low, high = bounds

    def accuracy(classes: Tensor) -> ShotAccuracy:
        samples = classes[labels]
        top1 = _percent(ranks[samples] < 1) if samples.any() else None
        return ShotAccuracy(classes=int(classes.sum()), samples=int(samples.sum()), top1=top1)

    many, few = images > high, images < low
    return ShotMetrics(bounds=bounds, many=accuracy(many), medium=accuracy(~(many | few)), few=accuracy(few))


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
