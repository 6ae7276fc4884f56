"""Mixed view images as they must be, written from the names of a bank's columns, without the project's rendering."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

from storage.store.markers import Task
from storage.store.store import Store
from storage.views.policy import policy

if TYPE_CHECKING:
    from pathlib import Path

    from student.data.batch import Batch

SIDE, SEED, VIEWS = 32, 5, 2
DEIT = policy("deit", SIDE, SEED)

Row = dict[str, float]


def rows_of(store: Path, shard: str, view: int) -> list[Row]:
    """A bank's rows as zarr alone reads them, by the names in the array's attributes."""
    import zarr

    marker = Store.open(store).marker(Task("bank", DEIT.bank, shard, view))
    path = f"{marker.task.folder}/{marker.record.attempt}/parameters"
    array = zarr.open_array(store / path, mode="r")
    columns: Any = array.attrs["columns"]
    return [dict(zip(columns, row, strict=True)) for row in np.asarray(array[:]).tolist()]


def alone(data: bytes, row: Row) -> np.ndarray:
    """The view image of one sample before mixing."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    box = (row["left"], row["top"], row["right"], row["bottom"])
    image = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box)
    assert (row["shift_x"], row["shift_y"]) == (0, 0)
    if row["flip"]:
        image = ImageOps.mirror(image)
    for n in "12":
        image = operation(image, int(row[f"op{n}"]), row[f"magnitude{n}"])
    assert (row["op3"], row["op4"]) == (0, 0)
    pixels = np.array(image)
    left, top, right, bottom = (int(row[f"erase_{side}"]) for side in ("left", "top", "right", "bottom"))
    if right > left:
        chance = np.random.Generator(np.random.Philox(key=int(row["erase_seed"])))
        pixels[top:bottom, left:right] = np.frombuffer(
            chance.bytes((bottom - top) * (right - left) * 3), np.uint8
        ).reshape(bottom - top, right - left, 3)
    return pixels


def operation(image: Image.Image, number: int, argument: float) -> Image.Image:
    def affine(*matrix: float) -> Image.Image:
        return image.transform(
            image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC, fillcolor=(124, 116, 104)
        )

    def brighter(value: int) -> int:
        return min(255, value + int(argument)) if value < 128 else value

    enhance = {8: ImageEnhance.Color, 9: ImageEnhance.Contrast, 10: ImageEnhance.Brightness, 11: ImageEnhance.Sharpness}
    if number in enhance:
        return enhance[number](image).enhance(argument)
    return {
        0: lambda: image,
        1: lambda: ImageOps.autocontrast(image),
        2: lambda: ImageOps.equalize(image),
        3: lambda: ImageOps.invert(image),
        4: lambda: image.rotate(argument, resample=Image.Resampling.BICUBIC, fillcolor=(124, 116, 104)),
        5: lambda: ImageOps.posterize(image, int(argument)),
        6: lambda: ImageOps.solarize(image, int(argument)),
        7: lambda: image.point([brighter(value) for value in range(256)] * 3),
        12: lambda: affine(1, argument, 0, 0, 1, 0),
        13: lambda: affine(1, 0, 0, argument, 1, 0),
        14: lambda: affine(1, 0, argument * SIDE, 0, 1, 0),
        15: lambda: affine(1, 0, 0, 0, 1, argument * SIDE),
    }[number]()


@dataclass
class Expected:
    """What a sample in one view must be."""

    image: np.ndarray
    label: int
    other: int
    share: float
    partner: int


def assert_as(batch: Batch, expected: dict[tuple[int, int, int], Expected]) -> None:
    for row, id in enumerate(batch.ids.tolist()):
        told = expected[tuple(id)]
        assert np.array_equal(batch.images[row], told.image), id
        assert (int(batch.labels[row]), int(batch.mix_labels[row])) == (told.label, told.other), id
        assert float(batch.mix_weights[row]) == told.share, id


def same(a: Batch, b: Batch) -> bool:
    arrays = [(getattr(a, n), getattr(b, n)) for n in ("images", "labels", "mix_labels", "mix_weights", "ids")]
    arrays += [(a.targets[t][n], b.targets[t][n]) for t in a.targets for n in a.targets[t]]
    return a.targets.keys() == b.targets.keys() and all(torch.equal(x, y) for x, y in arrays)


def all_same(a, b) -> bool:
    return all(same(x, y) for x, y in zip(a, b, strict=True))
