"""Prediction: what a student sees in images, on the evaluation view that it was trained for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from storage.errors import UserError, first_line
from storage.shards.image_files import counted, is_image, listing
from storage.shards.tar import IMAGES
from storage.views.draw import draw_view
from storage.views.policy import Policy, policy
from storage.views.render import BadImage, decode, render
from student.models.files import StudentDescription


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
            odd = [counted("file(s) are no images", others)] if others else []
            for line in (*odd, *replace(inside, lost=[]).left_out()):
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
    advance: Callable[[int], None] = lambda _images: None,
    batch: int = 64,
    beside: Callable[[np.ndarray], AbstractContextManager[None]] = lambda _images: nullcontext(),
) -> tuple[list[tuple[str, list[tuple[str, float]]]], list[tuple[str, str]]]:
    """(file, its `top` classes with their probabilities, the largest first) for each image; (file, reason) of others.

    Args:
        model: the student, in eval mode, on its device.
        about: how it is fed and what its classes are called; without names they are called by their numbers.
        files: JPEG, PNG or WebP.
        top: how many classes, at most all.
        advance: called with the number of images done.
        batch: images at a time.
        beside: what holds while the model looks at uint8 images `[n, S, S, 3]`, such as the attention that it copies.
    """
    view = policy(about.evaluation, about.img_size)
    device = next(model.parameters()).device
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (about.mean, about.std))
    found: list[tuple[str, list[tuple[str, float]]]] = []
    broken: list[tuple[str, str]] = []
    for start in range(0, len(files), batch):
        several = files[start : start + batch]
        there: list[str] = []
        rendered: list[np.ndarray] = []
        for file in several:
            try:
                rendered.append(_rendered(file, view))
                there.append(str(file))
            except UserError as error:
                broken.append((str(file), str(error)))
        advance(len(several))
        if not there:
            continue
        images = np.stack(rendered)
        pixels = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 255
        with beside(images):
            shares = model((pixels - mean) / std).float().softmax(1)
        values, classes = shares.topk(min(top, shares.shape[1]), 1)
        for name, ps, ns in zip(there, values.tolist(), classes.tolist(), strict=True):
            names = [about.classes[n] if about.classes else str(n) for n in ns]
            found.append((name, list(zip(names, ps, strict=True))))
    return found, broken


def _rendered(file: Path, view: Policy) -> np.ndarray:
    """The evaluation view of an image file, uint8 `[S, S, 3]`. Raises UserError: why it cannot be read."""
    try:
        image = decode(file.read_bytes())
    except BadImage as error:
        raise UserError(f"{error}; convert it, or leave it out") from None
    except OSError as error:
        raise UserError(f"cannot be read: {first_line(error)}") from None
    return render(image, draw_view(view, "", 0, image.size), view.size)
