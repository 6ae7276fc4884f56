"""Localisation without boxes in training: where a student's class token looks, against true boxes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from precompute.taps import AttentionTaps
from storage.errors import UserError
from storage.shards.index import cached_index
from student.alignment.student_spec import student_spec
from student.evaluation.localization.contours import LEVELS, grey, scipy_image
from student.evaluation.localization.dataset import BoxedImage, boxed_images
from student.evaluation.localization.max_box_acc import (
    SIDE,
    Convention,
    best_overlaps,
    box_metrics,
    found_boxes,
    overlaps,
)
from student.losses.aal import class_maps
from student.models.files import StudentDescription

SHOWN = 8  # images of a picture


@dataclass(frozen=True)
class LocalizedImage:
    """An image of the picture: its map, uint8 `[224, 224]`, and the box that is predicted, `[4]`, with its IoU."""

    image: BoxedImage
    map: np.ndarray
    box: np.ndarray
    overlap: float


class ClassAttention:
    """Where a student looks: the mean of the class token's attention over the patches, of all layers and heads (AAL).

    Raises:
        UserError: a student without attention that can be read, or without a class token.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        shape = student_spec(model)
        if "class" not in shape.prefix:
            raise UserError(f"{name}: the student has no class token, so it has no class rows to localise by")
        self.model, self.taps, self.prefix = model, AttentionTaps(model), len(shape.prefix)
        self.grids, self.count = [grid for _, grid in shape.by_layer], shape.maps
        sides = " and ".join(f"{grid}x{grid}" for grid in dict.fromkeys(self.grids))
        self.text = f"mean of {shape.maps} class-row maps of {sides}"

    @torch.no_grad()
    def maps(self, pixels: Tensor) -> np.ndarray:
        """Maps f32 `[B, 224, 224]` of normalised images `[B, 3, S, S]`, resized by bicubic interpolation.

        It is computed in f64, so that what is constant stays so.
        """
        self.model(pixels)
        total = torch.zeros((), dtype=torch.float64)
        for grid in dict.fromkeys(self.grids):
            mine = [n for n, side in enumerate(self.grids) if side == grid]
            q, k = ([several[n] for n in mine] for several in (self.taps.q, self.taps.k))
            rows = class_maps(q, k, [self.taps.scales[n] for n in mine], self.prefix, "scaled").sum(1).cpu().double()
            total = total + F.interpolate(rows.view(-1, 1, grid, grid), (SIDE, SIDE), mode="bicubic")[:, 0]
        maps: np.ndarray = (total / self.count).float().numpy()
        return maps


def localize(
    looker: ClassAttention,
    about: StudentDescription,
    urls: Sequence[str],
    convention: Convention = "official",
    *,
    device: torch.device | str = "cpu",
    batch: int = 64,
    shown: bool = False,
    advance: Callable[[int], None] = lambda _samples: None,
) -> tuple[dict[str, Any], list[LocalizedImage]]:
    """MaxBoxAcc, V1 and V2, beside a centred box; and some images for a picture, spread over the shards.

    The predicted box of a picture is that of the largest contour, at the threshold that is best for IoU 0.5.

    Args:
        looker: at the student, on the device, in eval mode.
        about: how it is fed; the whole image is resized, nothing is cut off.
        urls: shards with boxes; samples without one do not count.
        convention: of the boxes' ends.
        device: where the student is.
        batch: images at a time.
        shown: whether images are kept for a picture.
        advance: called with the number of samples done.

    Raises:
        UserError: no sample has a box, one that is none, an image that cannot be decoded.
    """
    scipy_image()  # told before anything is spent
    total = sum(len(cached_index(url)) for url in urls)
    wanted = set(np.linspace(0, total - 1, min(SHOWN, total)).round().astype(int).tolist()) if shown else set()
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (about.mean, about.std))
    best: list[np.ndarray] = []
    truths: list[np.ndarray] = []
    kept: list[tuple[BoxedImage, np.ndarray]] = []
    images = enumerate(boxed_images(urls, about.img_size))
    while several := list(islice(images, batch)):
        there = [(number, image) for number, image in several if len(image.boxes)]
        if there:
            pixels = torch.from_numpy(np.stack([image.pixels for _, image in there])).to(device)
            maps = looker.maps((pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std)
            for (number, image), values in zip(there, maps, strict=True):
                level = grey(values)
                best.append(best_overlaps(level, image.boxes, convention))
                truths.append(image.boxes)
                if number in wanted:
                    kept.append((image, level))
        advance(len(several))
    if not best:
        raise UserError(f"{urls[0]}: no sample says a bbox in its json, so there is nothing to localise against")
    told = {**box_metrics(np.stack(best), truths), "samples": len(best), "without_box": total - len(best)}
    at = round(told["v1"]["0.5"]["threshold"] * LEVELS)
    return told, [_shown(image, level, at, convention) for image, level in kept]


def _shown(image: BoxedImage, level: np.ndarray, at: int, convention: Convention) -> LocalizedImage:
    box = found_boxes(level, at, convention)[:1]
    return LocalizedImage(image, level, box[0], float(overlaps(box, image.boxes).max()))
