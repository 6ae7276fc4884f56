"""For tests, ours and anybody's: synthetic shards, tiny teachers, and a place for a store that injects faults."""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from storage.objects.object_store import LocalObjectStore
from storage.rng import generator

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# timm names with arguments: networks of every kind that count, small enough to export in a second or two.
TINY_CNN: tuple[str, dict[str, Any]] = ("resnet10t", {"channels": [8, 12, 16, 24], "stem_width": 8})
TINY_VIT: tuple[str, dict[str, Any]] = (
    "vit_tiny_patch16_224",
    {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3},
)


def synthetic_image(label: int, rng: np.random.Generator, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """A picture with a bright blob on a noisy ground; hue and place of the blob tell the label."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    cx = width * (0.25 + 0.5 * ((label * 0.37) % 1)) + rng.normal(0, 1)
    cy = height * (0.25 + 0.5 * ((label * 0.61) % 1)) + rng.normal(0, 1)
    blob = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * (min(size) / 6) ** 2))
    color = 128 + 100 * np.cos(2 * np.pi * (label / 5 + np.array([0.0, 1 / 3, 2 / 3])))
    pixels = rng.integers(0, 90, (height, width, 3)) + blob[..., None] * color
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def synthetic_shards(
    folder: str | Path,
    shards: int = 2,
    samples: int = 100,
    classes: int = 3,
    *,
    seed: int = 0,
    size: tuple[int, int] = (40, 32),
    kind: str = "png",
    labels: bool = True,
    stem: str = "shard",
    picture: Callable[[int, np.random.Generator, tuple[int, int]], Image.Image] = synthetic_image,
) -> list[str]:
    """Write shards of synthetic images with `classes.json`; their paths.

    `picture(label, rng, (width, height))` draws one.
    """
    import webdataset

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(shards):
        rng = generator("synthetic", seed, number)
        path = folder / f"{stem}-{number:06d}.tar"
        with webdataset.TarWriter(str(path), mtime=0) as writer:
            for i in range(samples):
                label = i % classes
                buffer = io.BytesIO()
                picture(label, rng, size).save(buffer, {"jpg": "jpeg"}.get(kind, kind))
                members = {"cls": str(label).encode()} if labels else {}
                writer.write({"__key__": f"{stem}-{number:06d}-{i:05d}", kind: buffer.getvalue(), **members})
        paths.append(str(path))
    (folder / "classes.json").write_text(json.dumps([f"class{c}" for c in range(classes)]))
    return paths


class FaultyObjectStore(LocalObjectStore):
    """A local place whose `fail_at`-th read, write, sync or link fails: once, or from then on.

    Args:
        folder: where the objects lie.
        operation: `read`, `write`, `sync` or `link`.
        fail_at: which one fails, from 0; -1 for none, to count them (`calls`).
        fault: `EIO`, `ENOSPC`, `short` (half of the bytes are written, then EIO) or `lost` (it succeeds, and says EIO).
        forever: every later one fails too.
    """

    def __init__(
        self, folder: str | Path, operation: str = "write", fail_at: int = -1, fault: str = "EIO", forever: bool = False
    ) -> None:
        super().__init__(folder)
        self.operation, self.fail_at, self.fault, self.forever = operation, fail_at, fault, forever
        self.calls = 0

    def _do(
        self, operation: str, act: Callable[..., Any], *arguments: Any, half: Callable[[], Any] | None = None
    ) -> Any:
        if operation != self.operation:
            return act(*arguments)
        self.calls += 1
        number = self.calls - 1
        if not (number == self.fail_at or (self.forever and 0 <= self.fail_at < number)):
            return act(*arguments)
        if self.fault == "lost":
            act(*arguments)
        elif self.fault == "short" and half is not None:
            half()
        code = errno.ENOSPC if self.fault == "ENOSPC" else errno.EIO
        raise OSError(code, os.strerror(code))

    def _read(self, path: Path) -> bytes:
        return bytes(self._do("read", super()._read, path))

    def _read_into(self, path: Path, buffers: Sequence[np.ndarray]) -> int:
        return int(self._do("read", super()._read_into, path, buffers))

    def _write(self, path: Path, data: bytes) -> None:
        self._do("write", super()._write, path, data, half=lambda: path.write_bytes(data[: len(data) // 2]))

    def _sync(self, descriptor: int) -> None:
        self._do("sync", super()._sync, descriptor)

    def _link(self, source: Path, target: Path) -> None:
        self._do("link", super()._link, source, target)
