"""Boxes of the contours in a thresholded map, by OpenCV, as the authors of MaxBoxAcc find them."""

from __future__ import annotations

from typing import Any

import numpy as np

from storage.errors import UserError
from storage.rounding import constant

LEVELS = 255  # thresholds that a uint8 map of maximum 255 can tell apart: of 0 to 254, strictly greater


def opencv() -> Any:
    """The module `cv2`. Raises UserError where it is not installed."""
    try:
        import cv2
    except ImportError:
        hint = "Install it: pip install -c constraints.txt -e '.[cpu,localize]'"
        raise UserError("contours need OpenCV, which is not installed", hint=hint) from None
    return cv2


def contour_boxes(mask: np.ndarray) -> np.ndarray:
    """The boxes of all contours in a mask bool `[H, W]`: int64 `[n, 4]`, left, top, right, bottom, ends included.

    That of the contour with the largest area comes first; of several the first that OpenCV lists.
    """
    cv2 = opencv()
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
    boxes = np.array([cv2.boundingRect(contour) for contour in contours], np.int64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2] - 1
    if len(boxes) > 1:
        largest = int(np.argmax([cv2.contourArea(contour) for contour in contours]))
        boxes[[0, largest]] = boxes[[largest, 0]]
    return boxes


def gray(values: np.ndarray) -> np.ndarray:
    """A map f32 `[H, W]` from 0 to 255, uint8; zeros where it is constant, but for rounding, or no number."""
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)) or constant(float(low), float(high)):
        return np.zeros(values.shape, np.uint8)
    shifted = values - low
    scaled: np.ndarray = (shifted / shifted.max() * 255).astype(np.uint8)
    return scaled
