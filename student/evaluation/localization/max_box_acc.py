"""MaxBoxAcc and MaxBoxAccV2 (Choe et al. 2020, "Evaluating Weakly Supervised Object Localization Methods Right").

A map is thresholded at 0, 0.001, … 0.999 of its maximum; the box of the largest contour (V2: the best of all contours)
counts as right where its IoU with a true box is at least δ; what is reported is the accuracy at the threshold that is
best for the whole set. A map has 256 values, so that 255 thresholds differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from student.evaluation.localization.contours import LEVELS, contour_boxes

SIDE = 224  # images, maps and boxes are brought to this size
OVERLAPS = (0.3, 0.5, 0.7)

Convention = Literal["official", "exact"]


def overlaps(boxes: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """IoU of boxes `[n, 4]` with true ones `[m, 4]`, ends included: f64 `[n, m]`."""
    low = np.maximum(boxes[:, None, :2], truth[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], truth[None, :, 2:])
    both = (high - low + 1).clip(0).prod(-1)
    areas = [(each[:, 2:] - each[:, :2] + 1).prod(-1) for each in (boxes, truth)]
    iou: np.ndarray = both / (areas[0][:, None] + areas[1][None] - both)
    return iou


def resized_boxes(boxes: Sequence[Sequence[float]], size: tuple[int, int]) -> np.ndarray:
    """Boxes in the pixels of an image of (width, height) as they are in its 224×224 pixels: int64 `[m, 4]`.

    As in the authors' code, int(x · 224 / width): the product comes first, as x · (224 / width) may fall just below a
    whole number. A box that ends at the image's width or height ends at 224.
    """
    scaled = np.array(boxes, np.float64).reshape(-1, 4) * SIDE / np.array([*size, *size])
    whole: np.ndarray = scaled.astype(np.int64)
    return whole


def found_boxes(image: np.ndarray, level: int, convention: Convention) -> np.ndarray:
    """Boxes of what is brighter than `level` in a map uint8 `[224, 224]`, the largest contour's first: `[n, 4]`.

    `official` boxes end one pixel later, as in the authors' code, which takes x + width for the last pixel; `exact`
    ones end where the contour does. Where nothing is brighter, the box is the first pixel.
    """
    boxes = contour_boxes(image > level)
    if not len(boxes):
        return np.zeros((1, 4), np.int64)
    if convention == "official":
        boxes[:, 2:] = np.minimum(boxes[:, 2:] + 1, SIDE - 1)
    return boxes


def best_overlaps(image: np.ndarray, truth: np.ndarray, convention: Convention) -> np.ndarray:
    """IoU with the best true box at each threshold, of the largest contour and of the best of all: f64 `[2, 255]`."""
    best = np.zeros((2, LEVELS))
    occurs = np.bincount(image.ravel(), minlength=LEVELS + 1) > 0
    for level in range(LEVELS):
        if level and not occurs[level]:  # the same pixels as before are brighter
            best[:, level] = best[:, level - 1]
            continue
        iou = overlaps(found_boxes(image, level, convention), truth).max(1)
        best[:, level] = iou[0], iou.max()
    return best


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxAccuracy:
    """Accuracy in percent at the threshold, a part of the map's maximum, that is best for the whole set."""

    accuracy: float
    threshold: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CenteredBoxAccuracy:
    """Accuracy in percent of one box in the middle of every image, whose side is best for the whole set."""

    accuracy: float
    side: int


BoxAccuracies = Mapping[float, BoxAccuracy] | Mapping[float, CenteredBoxAccuracy]  # by δ


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxMetrics:
    """Accuracies by δ.

    Attributes:
        v1: of the largest contour.
        v2: of the best of all contours.
        center: of a centered box: the baseline without maps.
    """

    v1: Mapping[float, BoxAccuracy]
    v2: Mapping[float, BoxAccuracy]
    center: Mapping[float, CenteredBoxAccuracy]

    def to_json(self) -> dict[str, Any]:
        """Plain data, with MaxBoxAcc, MaxBoxAccV2 and means.

        Numbers are rounded once, to three decimals: a mean of rounded ones can differ from the rounded mean.
        """
        kinds: dict[str, BoxAccuracies] = {"v1": self.v1, "v2": self.v2, "center": self.center}
        plain: dict[str, Any] = {
            kind: {**{str(overlap): asdict(one) for overlap, one in by_overlap.items()}, "means": means(by_overlap)}
            for kind, by_overlap in kinds.items()
        }
        v1, v2 = self.v1[0.5].accuracy, plain["v2"]["means"]["0.3,0.5,0.7"]
        return {name: _rounded(value) for name, value in {"max_box_acc": v1, "max_box_acc_v2": v2, **plain}.items()}


def max_box_acc(best: np.ndarray) -> dict[float, BoxAccuracy]:
    """δ -> accuracy at the best threshold.

    Args:
        best: IoU of each image at each threshold, f64 `[N, 255]`.
    """
    return {overlap: BoxAccuracy(accuracy=percent, threshold=n / LEVELS) for overlap, percent, n in _best_columns(best)}


def _best_columns(best: np.ndarray) -> list[tuple[float, float, int]]:
    """Each δ, the largest share of images whose IoU is at least δ in one column, in percent, and this column."""
    shares = [(overlap, (best >= overlap).mean(0)) for overlap in OVERLAPS]
    return [(overlap, 100 * float(share.max()), int(share.argmax())) for overlap, share in shares]


def centered(truths: Sequence[np.ndarray]) -> dict[float, CenteredBoxAccuracy]:
    """δ -> what one box in the middle of every image reaches, as large as is best for it: the baseline without maps."""
    sides = np.arange(1, SIDE + 1)
    low = (SIDE - sides) // 2
    boxes = np.stack([low, low, low + sides - 1, low + sides - 1], 1)
    best = np.stack([overlaps(boxes, truth).max(1) for truth in truths])
    return {overlap: CenteredBoxAccuracy(accuracy=percent, side=n + 1) for overlap, percent, n in _best_columns(best)}


def means(accuracies: BoxAccuracies) -> dict[str, float]:
    """Mean accuracies over the first two and over all three δ, as AAL's Table C and V2 have them."""
    first, second, third = (accuracies[overlap].accuracy for overlap in OVERLAPS)
    return {"0.3,0.5": (first + second) / 2, "0.3,0.5,0.7": (first + second + third) / 3}


def box_metrics(best: np.ndarray, truths: Sequence[np.ndarray]) -> BoxMetrics:
    """Accuracies of the largest contour, of all contours, and of a centered box.

    Args:
        best: as `best_overlaps` gives it for each image, f64 `[N, 2, 255]`.
        truths: the true boxes of each image, `[m, 4]`.
    """
    return BoxMetrics(v1=max_box_acc(best[:, 0]), v2=max_box_acc(best[:, 1]), center=centered(truths))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return round(value, 3) if isinstance(value, float) else value
