"""What the benches run on: photographs in shards, teachers with random weights, stores in a folder that goes away."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from precompute.export.pytorch import live_teacher
from precompute.request import PrecomputeRequest
from precompute.run import precompute
from precompute.taps.target_spec import parse_target
from precompute.teachers.teacher import Teacher, find_teacher
from precompute.throughput import PlannedShard
from storage.constants import BLOCK
from storage.errors import UserError
from storage.progress import NoProgress
from storage.shards.shard import open_shard
from storage.store.store import Store
from storage.testing import synthetic_shards
from storage.views.policy import policy

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from precompute.taps import Tap

PHOTO = (500, 375)  # pixels; ImageNet's photographs have 400 x 350 on average
CLASSES = 10
# case -> timm's name, what it is asked for. Speed does not depend on what the weights are worth.
TEACHERS = {
    "EfficientNet-B0": ("efficientnet_b0", ["activations,grid=14,codec=u8"]),
    "ViT-Tiny": ("vit_tiny_patch16_224", ["class_row,codec=f16", "class_token,codec=f16"]),
}


def photo(_label: int, rng: np.random.Generator, size: tuple[int, int] = PHOTO) -> Image.Image:
    """Noise with the spectrum of photographs, so that JPEG files of it are as large and as slow to decode."""
    image = np.zeros((size[1], size[0], 3), np.float32)
    for octave in range(1, 8):
        side = 2**octave
        coarse = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))
        image += np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.float32) * 0.5**octave
    return Image.fromarray((image + rng.normal(0, 4, image.shape)).clip(0, 255).astype(np.uint8))


class World:
    """Shards, teachers and stores below one folder.

    Args:
        folder: an empty one.
        shards: photographs to take in place of synthetic ones; the first shard is used.
        device: `cpu` or `cuda`, where PyTorch and the teachers' sessions compute.
        quick: fewer images.
    """

    def __init__(self, folder: Path, shards: list[str], device: str, quick: bool) -> None:
        self.folder, self.shards, self.device, self.quick = folder, shards, device, quick
        self.quiet = NoProgress()

    def photos(self) -> PlannedShard:
        """The first blocks of a shard of photographs."""
        most = BLOCK * (2 if self.quick else 8)
        if not self.shards:
            where = self.folder / "photos"
            self.shards = synthetic_shards(where, 1, most, CLASSES, size=PHOTO, kind="jpg", picture=photo)
        shard = open_shard(self.shards[0])
        if len(shard) < 2:
            raise UserError(f"{shard.url}: one sample is too few to measure anything")
        return PlannedShard(url=shard.url, samples=min(len(shard), most), id=shard.id, opened=shard)

    def small(self, samples: int, size: int) -> list[str]:
        """Two shards of small labeled images."""
        where = self.folder / f"small-{size}"
        if not where.exists():
            samples, kind = samples // 4 if self.quick else samples, "png" if size < 100 else "jpg"
            synthetic_shards(where, 2, samples, CLASSES, size=(size, size), kind=kind)
        return sorted(str(path) for path in where.glob("*.tar"))

    def teacher(self, model: str, size: int = 224) -> Teacher:
        """A teacher with random weights, of as many classes as the images have, with inputs of some size."""
        arguments = {"num_classes": CLASSES}
        path = self.folder / f"{model}.safetensors"
        if not path.exists():
            torch.manual_seed(0)
            save_file(timm.create_model(model, **arguments).state_dict(), path)
        called = model.partition("_")[0]
        return find_teacher(
            model, weights=str(path), arguments=arguments, input_size=size, mean=(0.5,), std=(0.5,), teacher_name=called
        )

    def live(self, teacher: Teacher, taps: Sequence[Tap], size: int) -> torch.nn.Module:
        """The PyTorch teacher over view images of a size, channels last."""
        module: torch.nn.Module = live_teacher(teacher, taps, size).to(self.device)
        return module.to(memory_format=torch.channels_last)

    def request(
        self, shards: list[str], teacher: Teacher, targets: list[str], size: int, **more: Any
    ) -> PrecomputeRequest:
        """Targets over `deit` views of some size, as a user would ask for them."""
        specs = [spec for target in targets for spec in parse_target(target)]
        return PrecomputeRequest(
            shards=shards, teacher=teacher, targets=specs, policy=policy("deit", size), provider=self.device, **more
        )

    def store(self, name: str) -> Store:
        """A new store."""
        return Store.create(self.folder / name)

    def recorded(
        self, store: Store, shards: list[str], teacher: Teacher, targets: list[str], size: int, **more: Any
    ) -> list[str]:
        """Ids of targets over two `deit` views, made by precompute."""
        request = self.request(shards, teacher, targets, size, num_views=2, **more)
        result = precompute(store, request, self.quiet)
        for failure in result.failures:
            raise UserError(failure.error)
        return result.targets
