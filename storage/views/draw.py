"""Drawing views: their parameters, from policy, seed, key and view number alone."""

from __future__ import annotations

import math
from dataclasses import replace
from decimal import Context, Decimal
from typing import TYPE_CHECKING, Any

from storage.rng import generator
from storage.views.randaugment import draw_operations
from storage.views.view import CUTMIX, MIXUP, Box, Mix, View

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np

    from storage.views.policy import Policy

_DECIMAL = Context(prec=28)


def draw_view(
    policy: Policy, key: str, view: int, image_size: tuple[int, int], *, i: int = 0, block: range = range(1)
) -> View:
    """The view of a sample with this number under a policy.

    Chance comes from (line, seed, key, view) alone; the size (width, height) of the image turns it into pixels, and the
    sample's index `i` and its block, both in the shard, turn it into a partner for mixing. Where the partner turns out
    to be invalid, `settle` takes the mixing away.
    """
    chance = generator("view", policy.line, policy.seed, key, view)
    width, height = image_size
    side = policy.size
    parameters: dict[str, Any] = {"box": (0.0, 0.0, float(width), float(height))}
    for name, arguments in policy.operations:
        if name == "short":  # the short side becomes round(S/f); `center` then keeps the middle S×S of it
            parameters["box"] = _middle(width, height, min(width, height) * side / round(side / arguments[0]))
        elif name == "crop":
            border = round(arguments[0] * side)
            parameters["box"] = _middle(width, height, min(width, height))
            parameters["shift"] = tuple(chance.integers(-border, border, size=2, endpoint=True).tolist())
        elif name == "rrc":
            parameters["box"] = _resized_crop(chance, width, height, arguments)
        elif name == "flip":
            parameters["flip"] = bool(chance.integers(2))
        elif name == "randaug":
            parameters["operations"] = draw_operations(chance, *arguments)
        elif name == "erase" and chance.random() < arguments[0]:
            parameters["erased"] = _erased_box(chance, side)
            parameters["erase_seed"] = int(chance.integers(2**32))
        elif name == "mix":
            parameters["mix"] = _mix(chance, side, arguments, i, block)
    return View(**parameters)


def settle(views: Sequence[View], block: range) -> list[View]:
    """The views of a whole block, without the mixing of those whose partner is invalid."""
    return [
        replace(view, mix=None) if view.mix and not views[view.mix.partner - block.start].valid else view
        for view in views
    ]


TRIES = 10  # boxes that are drawn before the middle is taken (crop), or nothing (erase)


def _resized_crop(chance: np.random.Generator, width: int, height: int, scale: Sequence[float]) -> Box:
    """Inception's crop: a part of the area in `scale`, an aspect ratio from 3/4 to 4/3, log-uniform."""
    for w, h in _sides(chance, width * height, scale, 3 / 4):
        if 0 < w <= width and 0 < h <= height:
            left, top = chance.integers(width - w, endpoint=True), chance.integers(height - h, endpoint=True)
            return (float(left), float(top), float(left + w), float(top + h))
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    x, y = float((width - w) // 2), float((height - h) // 2)
    return (x, y, x + w, y + h)


def _erased_box(chance: np.random.Generator, side: int) -> tuple[int, int, int, int]:
    """Random erasing (Zhong et al. 2020) with timm's ranges: 2 % to a third of the area, aspect ratio 0.3 to 1/0.3."""
    for h, w in _sides(chance, side * side, (0.02, 1 / 3), 0.3):
        if 0 < w < side and 0 < h < side:
            top, left = int(chance.integers(side - h, endpoint=True)), int(chance.integers(side - w, endpoint=True))
            return (left, top, left + w, top + h)
    return (0, 0, 0, 0)


def _sides(chance: np.random.Generator, area: int, scale: Sequence[float], low: float) -> Iterator[tuple[int, int]]:
    """Sides of boxes that are tried: a part of the area in `scale`, a ratio from `low` to 1/low, log-uniform.

    Decimal's exponential is rounded correctly on every machine, the C library's is not.
    """
    for _ in range(TRIES):
        part = area * chance.uniform(scale[0], scale[1])
        exponent = Decimal(chance.uniform(-1.0, 1.0)) * Decimal(low).ln(_DECIMAL)
        ratio = float(exponent.exp(_DECIMAL))
        yield round(math.sqrt(part * ratio)), round(math.sqrt(part / ratio))


def _mix(chance: np.random.Generator, side: int, alphas: Sequence[float], i: int, block: range) -> Mix | None:
    """Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019), each with ½ where both alphas are above 0."""
    u, which = chance.random(), chance.random()
    mixup, cutmix = alphas
    kind = MIXUP if mixup and (not cutmix or which < 0.5) else CUTMIX
    alpha = mixup if kind == MIXUP else cutmix
    share = float(chance.beta(alpha, alpha))
    box = (0, 0, 0, 0)
    if kind == CUTMIX:
        cut = int(side * math.sqrt(share))
        x, y = (int(n) for n in chance.integers(side, size=2))
        box = (max(x - cut // 2, 0), max(y - cut // 2, 0), min(x + cut // 2, side), min(y + cut // 2, side))
        share = (box[2] - box[0]) * (box[3] - box[1]) / side**2
    amount = round(256 * share)
    if len(block) < 2 or not amount:
        return None
    place = int(u * (len(block) - 1))
    partner = block.start + place + (block.start + place >= i)
    return Mix(kind=kind, partner=partner, amount=amount, box=box)


def _middle(width: int, height: int, side: float) -> Box:
    left, top = (width - side) / 2, (height - side) / 2
    return (left, top, left + side, top + side)
