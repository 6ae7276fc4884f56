"""Mixup and CutMix of rendered images, in rounded integers."""

from __future__ import annotations

import numpy as np

from storage.views.view import MIXUP, Mix


def mix_images(own: np.ndarray, partner: np.ndarray, mix: Mix) -> np.ndarray:
    """A view image mixed with its partner's, both uint8 [S, S, 3] as rendered: uint8 [S, S, 3], in rounded integers."""
    if mix.kind == MIXUP:
        total = own.astype(np.uint16) * (256 - mix.amount) + partner.astype(np.uint16) * mix.amount
        return ((total + 128) >> 8).astype(np.uint8)
    left, top, right, bottom = mix.box
    image = own.copy()
    image[top:bottom, left:right] = partner[top:bottom, left:right]
    return image
