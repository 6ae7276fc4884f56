"""Images with true boxes: read from shards whose samples say `bbox` in their `json`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from storage.errors import UserError
from storage.views.draw import draw_view
from storage.views.policy import policy
from storage.views.render import BadImage, decode, render
from student.evaluation.localization.max_box_acc import resized_boxes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np

    from storage.shards.shard import Shard
    from storage.shards.tar import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxedImage:
    """An image with its true boxes.

    Attributes:
        key: of the sample.
        pixels: the whole image resized, uint8 `[S, S, 3]`.
        boxes: int64 `[m, 4]` in 224×224 pixels; none where the sample says none.
    """

    key: str
    pixels: np.ndarray
    boxes: np.ndarray


def boxed_images(shards: Sequence[Shard], size: int) -> Iterator[BoxedImage]:
    """Every sample of shards, in order, with the whole image resized to `size`.

    Raises:
        UserError: an image that cannot be decoded, a `bbox` that is none.
    """
    view = policy("resize", size)
    for shard in shards:
        for number in range(shard.index.blocks):
            for sample in shard.read(shard.index.block(number)):
                where = f"{shard.url}: key {sample.key!r}"
                try:
                    image = decode(sample.image)
                except BadImage as error:
                    raise UserError(f"{where}: {error}\n  Fix or remove the image and pack again") from None
                boxes = resized_boxes(boxes_in(sample, image.size, where), image.size)
                pixels = render(image, draw_view(view, "", 0, image.size), size)
                yield BoxedImage(key=sample.key, pixels=pixels, boxes=boxes)


def boxes_in(sample: Sample, size: tuple[int, int], where: str) -> list[list[float]]:
    """The boxes that a sample's `json` says: `bbox`, one or a list of [left, top, right, bottom] in its image's pixels.

    Raises:
        UserError: it is no JSON object, or a box is not four numbers within the image, in this order.
    """
    if sample.json is None:
        return []
    try:
        content = json.loads(sample.json)
    except (ValueError, RecursionError):
        raise UserError(f"{where}: its json cannot be read as JSON; fix it and pack again") from None
    bbox = content.get("bbox") if isinstance(content, dict) else None
    if bbox is None or bbox == []:
        return []
    boxes = bbox if isinstance(bbox, list) and all(isinstance(one, list) for one in bbox) else [bbox]
    for box in boxes:
        if not _is_box(box, size):
            raise UserError(
                f"{where}: bbox {str(box)[:80]}: expected [left, top, right, bottom] in the pixels of the image, which "
                f"is {size[0]}x{size[1]}; fix its json and pack again"
            )
    return boxes


def _is_box(box: Any, size: tuple[int, int]) -> bool:
    if not isinstance(box, list) or len(box) != 4 or not all(type(v) in (int, float) for v in box):
        return False
    left, top, right, bottom = box
    return bool(0 <= left <= right <= size[0] and 0 <= top <= bottom <= size[1])  # no NaN is
