"""Localization without boxes in training: where a student's class token looks, against true boxes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from precompute.taps import AttentionTaps
from storage.errors import UserError
from storage.views.normalize import normalize
from student.alignment.student_spec import student_spec
from student.evaluation.localization import max_box_acc
from student.evaluation.localization.contours import LEVELS, gray, opencv
from student.evaluation.localization.dataset import BoxedImage, boxed_images
from student.evaluation.localization.max_box_acc import SIDE, BoxMetrics, Convention
from student.losses.aal import class_maps

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from storage.shards.shard import Shard
    from student.models.files import StudentDescription

SHOWN = 8  # images of a picture
BATCH = 64  # images at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalizedImage:
    """An image of the picture: its map, uint8 `[224, 224]`, and the box that is predicted, `[4]`, with its IoU."""

    image: BoxedImage
    map: np.ndarray
    box: np.ndarray
    overlap: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Localization:
    """How well a student's attention finds objects.

    Attributes:
        metrics: MaxBoxAcc, V1 and V2, beside a centered box.
        samples: images with a box.
        without_box: images that have none and do not count.
        images: some of them, for a picture.
    """

    metrics: BoxMetrics
    samples: int
    without_box: int
    images: tuple[LocalizedImage, ...]


class ClassAttention:
    """Where a student looks: the mean of the class token's attention over the patches, of all layers and heads (AAL).

    Raises:
        UserError: a student without attention that can be read, or without a class token.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        shape = student_spec(model)
        if "class" not in shape.prefix:
            raise UserError(f"{name}: the student has no class token, so it has no class rows to localize by")
        assert shape.attention is not None
        self.model, self.prefix, self.taps = model, len(shape.prefix), AttentionTaps(shape.attention.layers)
        self.grids, self.count = [grid for _, grid in shape.by_layer], shape.maps
        sides = " and ".join(f"{grid}x{grid}" for grid in dict.fromkeys(self.grids))
        self.text = f"mean of {shape.maps} class-row maps of {sides}"

    @torch.no_grad()
    def maps(self, pixels: Tensor) -> np.ndarray:
        """Maps f32 `[B, 224, 224]` of normalized images `[B, 3, S, S]`, resized by bicubic interpolation.

        It is computed in f64, so that what is constant stays so.
        """
        with self.taps:
            self.model(pixels)
        attention = self.taps.attention
        total = torch.zeros((), dtype=torch.float64)
        for grid in dict.fromkeys(self.grids):
            layers = [layer for layer, side in zip(attention, self.grids, strict=True) if side == grid]
            rows = class_maps(layers, self.prefix, "scaled").sum(1).cpu().double()
            total = total + F.interpolate(rows.view(-1, 1, grid, grid), (SIDE, SIDE), mode="bicubic")[:, 0]
        maps: np.ndarray = (total / self.count).float().numpy()
        return maps


def localize(
    looker: ClassAttention,
    about: StudentDescription,
    shards: Sequence[Shard],
    convention: Convention = "official",
    *,
    device: torch.device | str = "cpu",
    keep_images: bool = False,
    advance: Callable[[int], None] = lambda _samples: None,
) -> Localization:
    """MaxBoxAcc, V1 and V2, beside a centered box; and some images for a picture, spread over the shards.

    The predicted box of a picture is that of the largest contour, at the threshold that is best for IoU 0.5.

    Args:
        looker: at the student, on the device, in eval mode.
        about: how it is fed; the whole image is resized, nothing is cut off.
        shards: with boxes; samples without one do not count.
        convention: of the boxes' ends.
        device: where the student is.
        keep_images: whether images are kept for a picture.
        advance: called with the number of samples done.

    Raises:
        UserError: no sample has a box, one that is none, an image that cannot be decoded.
    """
    opencv()  # told before anything is spent
    total = sum(map(len, shards))
    pictured = set(np.linspace(0, total - 1, min(SHOWN, total)).round().astype(int).tolist()) if keep_images else set()
    best: list[np.ndarray] = []
    truths: list[np.ndarray] = []
    shown: list[tuple[BoxedImage, np.ndarray]] = []
    images = enumerate(boxed_images(shards, about.img_size))
    while chunk := list(islice(images, BATCH)):
        boxed = [(number, image) for number, image in chunk if len(image.boxes)]
        if boxed:
            pixels = torch.from_numpy(np.stack([image.pixels for _, image in boxed])).to(device)
            maps = looker.maps(normalize(pixels, about.mean, about.std))
            for (number, image), values in zip(boxed, maps, strict=True):
                level = gray(values)
                best.append(max_box_acc.best_overlaps(level, image.boxes, convention))
                truths.append(image.boxes)
                if number in pictured:
                    shown.append((image, level))
        advance(len(chunk))
    if not best:
        raise UserError(f"{shards[0].url}: no sample has a bbox in its json, so there is nothing to localize against")
    metrics = max_box_acc.box_metrics(np.stack(best), truths)
    threshold = round(metrics.v1[0.5].threshold * LEVELS)
    localized = tuple(_localized(image, level, threshold, convention) for image, level in shown)
    return Localization(metrics=metrics, samples=len(best), without_box=total - len(best), images=localized)


def _localized(image: BoxedImage, level: np.ndarray, threshold: int, convention: Convention) -> LocalizedImage:
    box = max_box_acc.found_boxes(level, threshold, convention)[:1]
    overlap = float(max_box_acc.overlaps(box, image.boxes).max())
    return LocalizedImage(image=image, map=level, box=box[0], overlap=overlap)
