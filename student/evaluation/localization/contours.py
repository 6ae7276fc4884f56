"""Boxes of the contours in a thresholded map, as `cv2.findContours` with `boundingRect` gives them, without OpenCV.

Outer contours go around pieces that hang together over sides and corners. A hole is ground that hangs together over
sides and does not reach the map's edge; its contour runs on the pixels around it. A contour's area is that of the
polygon through the middles of its pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from storage.errors import UserError
from storage.rounding import constant

LEVELS = 255  # thresholds that a uint8 map of maximum 255 can tell apart: of 0 to 254, strictly greater


def scipy_image() -> Any:
    """`scipy.ndimage`. Raises UserError where scipy is missing."""
    try:
        from scipy import ndimage
    except ImportError:
        raise UserError("contours need scipy: pip install -c constraints.txt -e '.[cpu,demo]'") from None
    return ndimage


def contour_boxes(mask: np.ndarray) -> np.ndarray:
    """The boxes of all contours in a mask bool `[H, W]`: int64 `[n, 4]`, left, top, right, bottom, ends included.

    That of the contour with the largest area comes first; of several the lowest, as OpenCV lists it first.
    """
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    if not len(rows):
        return np.zeros((0, 4), np.int64)
    ndimage = scipy_image()
    inner = np.pad(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], 1)
    pieces, count = ndimage.label(inner, np.ones((3, 3)))
    boxes = _extents(ndimage.find_objects(pieces))
    whole, outer = pieces, boxes  # without holes, and what lies in them
    if _has_holes(~inner, count):
        ground, grounds = ndimage.label(~inner)
        inside = np.arange(1, grounds + 1) != ground[0, 0]
        around = np.array([-1, -1, 1, 1])
        boxes = np.concatenate([boxes, _extents(ndimage.find_objects(ground))[inside] + around])
        if count > 1:
            whole, _ = ndimage.label(ground != ground[0, 0], np.ones((3, 3)))
            outer = _extents(ndimage.find_objects(whole))
    if count > 1:
        at = (boxes == outer[_largest(whole, outer)]).all(1).argmax()
        boxes[[0, at]] = boxes[[at, 0]]
    corner = np.array([columns[0] - 1, rows[0] - 1])
    moved: np.ndarray = boxes + np.concatenate([corner, corner])
    return moved


def _extents(slices: Any) -> np.ndarray:
    return np.array([(x.start, y.start, x.stop - 1, y.stop - 1) for y, x in slices], np.int64).reshape(-1, 4)


def _has_holes(ground: np.ndarray, pieces: int) -> bool:
    """Whether there is ground that does not reach the edge, by Euler's formula: a fifth of the time of looking for it.

    Pixels − pairs of neighbors + squares of four are the parts of the ground minus the pieces that it goes around.
    """
    pairs, below = ground[:, :-1] & ground[:, 1:], ground[:-1] & ground[1:]
    squares = pairs[:-1] & pairs[1:]
    count = np.count_nonzero
    return bool(count(ground) - count(pairs) - count(below) + count(squares) > 1 - pieces)


def _largest(pieces: np.ndarray, boxes: np.ndarray) -> int:
    """Which of the numbered pieces without holes has the largest area within its contour; of several the last."""
    most = (boxes[:, 2:] - boxes[:, :2]).prod(1)  # no area is larger than the box's
    best, found = -1.0, 0
    for n in np.argsort(-most, kind="stable").tolist():
        if most[n] < best:
            break
        left, top, right, bottom = boxes[n]
        area = _area(pieces[top : bottom + 1, left : right + 1] == n + 1)
        if area > best or (area == best and n > found):
            best, found = area, n
    return found


def _area(piece: np.ndarray) -> float:
    """Area within the contour of a mask without holes.

    Of each 2×2 pixels a contour encloses the square between their middles if all four are inside, half if three are.
    """
    columns = piece[:, :-1].view(np.uint8) + piece[:, 1:].view(np.uint8)
    inside = columns[:-1] + columns[1:]
    return float(np.count_nonzero(inside == 4) + np.count_nonzero(inside == 3) / 2)


def gray(values: np.ndarray) -> np.ndarray:
    """A map f32 `[H, W]` from 0 to 255, uint8; zeros where it is constant, but for rounding, or no number."""
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)) or constant(float(low), float(high)):
        return np.zeros(values.shape, np.uint8)
    shifted = values - low
    scaled: np.ndarray = (shifted / shifted.max() * 255).astype(np.uint8)
    return scaled
