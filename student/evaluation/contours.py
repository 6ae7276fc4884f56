"""Boxes of the contours in a thresholded map, as `cv2.findContours` with `boundingRect` gives them, without OpenCV.

Outer contours go around pieces that hang together over sides and corners. A hole is ground that hangs together over
sides and does not reach the map's edge; its contour runs on the pixels around it. A contour's area is that of the
polygon through the middles of its pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from storage.errors import UserError

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
    ground, grounds = ndimage.label(~inner)
    if grounds > 1:
        around = np.array([-1, -1, 1, 1])
        inside = np.arange(1, grounds + 1) != ground[0, 0]
        boxes = np.concatenate([boxes, _extents(ndimage.find_objects(ground))[inside] + around])
    if count > 1:
        whole, _ = ndimage.label(ground != ground[0, 0], np.ones((3, 3)))  # without holes, and what lies in them
        largest = _areas(whole)
        first = _extents(ndimage.find_objects(whole))[len(largest) - 1 - largest[::-1].argmax()]
        at = (boxes == first).all(1).argmax()
        boxes = np.concatenate([boxes[at : at + 1], np.delete(boxes, at, 0)])
    corner = np.array([columns[0] - 1, rows[0] - 1])
    moved: np.ndarray = boxes + np.concatenate([corner, corner])
    return moved


def _extents(slices: Any) -> np.ndarray:
    return np.array([(x.start, y.start, x.stop - 1, y.stop - 1) for y, x in slices], np.int64).reshape(-1, 4)


def _areas(pieces: np.ndarray) -> np.ndarray:
    """Area within the outer contour of each numbered piece without holes, f64 `[n]`.

    Of each 2×2 pixels a contour encloses the square between their middles if all four are inside, half if three are.
    """
    corners = np.stack([pieces[:-1, :-1], pieces[:-1, 1:], pieces[1:, :-1], pieces[1:, 1:]])
    inside = (corners > 0).sum(0)
    enclosed = np.where(inside == 4, 1.0, np.where(inside == 3, 0.5, 0.0))
    areas: np.ndarray = np.bincount(corners.max(0).ravel(), enclosed.ravel(), minlength=int(pieces.max()) + 1)[1:]
    return areas


def grey(values: np.ndarray) -> np.ndarray:
    """A map f32 `[H, W]` from 0 to 255, uint8; zeros where it is constant or no number."""
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)) or low == high:
        return np.zeros(values.shape, np.uint8)
    shifted = values - low
    scaled: np.ndarray = (shifted / shifted.max() * 255).astype(np.uint8)
    return scaled
