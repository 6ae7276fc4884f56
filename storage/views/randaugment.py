"""Operations of RandAugment, as timm's increasing set has them, made of Pillow's bit-exact uint8 functions alone.

An operation is stored as its number here and one argument that is final: degrees, bits, a factor, a part of the side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image, ImageEnhance, ImageOps

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

FILL = (124, 116, 104)  # the mean of ImageNet, which the field's recipes fill with
LEVELS = 10.0  # a magnitude runs from 0 to 10
PROBABILITY = 0.5  # of each operation that was picked
LAYERS = 2  # operations that are picked for an image
_ADDED_BELOW = 128  # SolarizeAdd brightens what is darker than this


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=FILL)


def _solarize_add(image: Image.Image, add: float) -> Image.Image:
    table = [min(255, i + int(add)) if i < _ADDED_BELOW else i for i in range(256)]
    return image.point(table * 3)


# number -> (name, what it does with an image and its argument); numbers are at rest and never change
OPERATIONS: dict[int, tuple[str, Callable[[Image.Image, float], Image.Image]]] = {
    1: ("auto_contrast", lambda image, _: ImageOps.autocontrast(image)),
    2: ("equalize", lambda image, _: ImageOps.equalize(image)),
    3: ("invert", lambda image, _: ImageOps.invert(image)),
    4: ("rotate", lambda image, degrees: image.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=FILL)),
    5: ("posterize", lambda image, bits: image if bits >= 8 else ImageOps.posterize(image, int(bits))),
    6: ("solarize", lambda image, threshold: ImageOps.solarize(image, int(threshold))),
    7: ("solarize_add", _solarize_add),
    8: ("color", lambda image, factor: ImageEnhance.Color(image).enhance(factor)),
    9: ("contrast", lambda image, factor: ImageEnhance.Contrast(image).enhance(factor)),
    10: ("brightness", lambda image, factor: ImageEnhance.Brightness(image).enhance(factor)),
    11: ("sharpness", lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor)),
    12: ("shear_x", lambda image, factor: _affine(image, (1, factor, 0, 0, 1, 0))),
    13: ("shear_y", lambda image, factor: _affine(image, (1, 0, 0, factor, 1, 0))),
    14: ("translate_x", lambda image, part: _affine(image, (1, 0, part * image.width, 0, 1, 0))),
    15: ("translate_y", lambda image, part: _affine(image, (1, 0, 0, 0, 1, part * image.height))),
}

# Degrees or parts of the side at the highest level, in either direction.
_SIGNED = {"rotate": 30.0, "shear_x": 0.3, "shear_y": 0.3, "translate_x": 0.45, "translate_y": 0.45}


def draw_operations(chance: np.random.Generator, magnitude: float, deviation: float) -> tuple[tuple[int, float], ...]:
    """RandAugment's choice for one image: two operations, each done with probability ½, magnitude N(m, σ) in 0 to 10.

    What `rand-m{magnitude}-mstd{deviation}-inc1` is in timm (Cubuk et al. 2020, with increasing severity).
    """
    chosen = []
    for _ in range(LAYERS):
        number = 1 + int(chance.integers(len(OPERATIONS)))
        done, level, negative = chance.random() < PROBABILITY, chance.normal(magnitude, deviation), chance.random()
        if done:
            # In steps of 2^-16: the normal draw may differ in its last bit between machines' C libraries.
            level = round(min(max(level, 0.0), LEVELS) / LEVELS * 65536) / 65536
            chosen.append((number, _argument(OPERATIONS[number][0], level, -1.0 if negative < 0.5 else 1.0)))
    return tuple(chosen)


def _argument(name: str, level: float, sign: float) -> float:
    """The argument of an operation at a level 0 to 1."""
    if name in _SIGNED:
        return sign * _SIGNED[name] * level
    match name:
        case "posterize":
            return max(1, 4 - int(level * 4))  # Pillow refuses to keep no bit at all
        case "solarize":
            return 256 - int(level * 256)
        case "solarize_add":
            return min(128, int(level * 110))
        case "color" | "contrast" | "brightness" | "sharpness":
            return max(0.1, 1.0 + sign * 0.9 * level)
        case _:
            return 0.0
