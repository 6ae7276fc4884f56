"""Prediction: what a student sees in images, on the evaluation view that it was trained for."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from storage.errors import UserError, first_line
from storage.shards.image_files import counted, is_image, listing
from storage.shards.tar import IMAGES
from storage.views.draw import draw_view
from storage.views.normalize import normalize
from storage.views.render import BadImage, decode, render

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from storage.views.policy import Policy
    from student.models.files import StudentDescription


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagePrediction:
    """An image's likeliest classes with their probabilities, the largest first."""

    image: str
    classes: tuple[tuple[str, float], ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"image": self.image, "classes": [{"class": n, "probability": p} for n, p in self.classes]}


@dataclass(frozen=True, slots=True, kw_only=True)
class UnreadableImage:
    """An image that could not be read, and why."""

    image: str
    error: str


def found_in(places: Sequence[Path], say: Callable[[str], None] = lambda _line: None) -> list[Path]:
    """The images that paths stand for, in their order; a folder stands for those in it, at any depth.

    Links that lead nowhere are among them, as files that cannot be read. `say` gets a line about each kind of other
    files in the folders.

    Raises:
        UserError: nothing is there, or a folder without images.
    """
    files: list[Path] = []
    for place in places:
        if place.is_dir():
            inside = listing(place)
            if not inside.images and not inside.lost:
                raise UserError(f"{place}: no images in this folder; expected {', '.join(IMAGES)}")
            files += sorted([*inside.images, *inside.lost])
            others = [path for path in inside.files if not is_image(path)]
            skipped = [counted("file(s) are no images", others)] if others else []
            for line in (*skipped, *replace(inside, lost=[]).left_out()):
                say(f"left out: {line}")
        elif place.is_file():
            files.append(place)
        else:
            raise UserError(f"{place}: no such image or folder; give images, or folders of them")
    return files


@torch.no_grad()
def predict(
    model: nn.Module,
    about: StudentDescription,
    files: Sequence[Path],
    top: int,
    *,
    advance: Callable[[int], None] = lambda _images: None,
    batch_size: int = 64,
    context: Callable[[np.ndarray], AbstractContextManager[None]] = lambda _images: nullcontext(),
) -> tuple[list[ImagePrediction], list[UnreadableImage]]:
    """What a student sees in images, and which images cannot be read.

    Args:
        model: the student, in eval mode, on its device.
        about: how it is fed and what its classes are called; without names they are called by their numbers.
        files: JPEG, PNG or WebP.
        top: how many classes, at most all.
        advance: called with the number of images done.
        batch_size: images at a time.
        context: what holds while the model looks at uint8 images `[n, S, S, 3]`, such as the attention that it copies.
    """
    view = about.evaluation_policy
    device = next(model.parameters()).device
    predictions: list[ImagePrediction] = []
    unreadable: list[UnreadableImage] = []
    for start in range(0, len(files), batch_size):
        rendered: dict[int, np.ndarray] = {}  # by place in the chunk: a file may be named twice
        chunk = files[start : start + batch_size]
        for number, file in enumerate(chunk):
            try:
                rendered[number] = _rendered(file, view)
            except UserError as error:
                unreadable.append(UnreadableImage(image=str(file), error=str(error)))
        advance(len(chunk))
        if not rendered:
            continue
        images = np.stack([*rendered.values()])
        pixels = normalize(torch.from_numpy(images).to(device), about.mean, about.std)
        with context(images):
            probabilities = model(pixels).float().softmax(1)
        values, numbers = probabilities.topk(min(top, probabilities.shape[1]), 1)
        for number, image_values, image_classes in zip(rendered, values.tolist(), numbers.tolist(), strict=True):
            names = [about.classes[n] if about.classes else str(n) for n in image_classes]
            classes = tuple(zip(names, image_values, strict=True))
            predictions.append(ImagePrediction(image=str(chunk[number]), classes=classes))
    return predictions, unreadable


def _rendered(file: Path, view: Policy) -> np.ndarray:
    """The evaluation view of an image file, uint8 `[S, S, 3]`. Raises UserError: why it cannot be read."""
    try:
        image = decode(file.read_bytes())
    except BadImage as error:
        raise UserError(f"{error}; convert it, or leave it out") from None
    except OSError as error:
        raise UserError(f"cannot be read: {first_line(error)}") from None
    return render(image, draw_view(view, "", 0, image.size), view.size)
