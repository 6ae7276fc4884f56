"""One batch: images, labels and stored targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from storage.store.codecs import Codec


@dataclass
class Batch:
    """Some samples: their view images, labels and stored targets.

    Attributes:
        images: uint8 `[B, S, S, 3]`, the pixels that the teacher saw.
        labels: int64 `[B]`; −1 where the shards have none.
        others: int64 `[B]`: labels of the images that view images were mixed with; their own where nothing was mixed.
        shares: f32 `[B]`: the others' share of each image and of its label.
        ids: int64 `[B, 3]`: number of the shard in the stream, index in the shard, view.
        targets: target id -> the codec's arrays, each `[B, …]`.
        codecs: target id -> codec.
    """

    images: Tensor
    labels: Tensor
    others: Tensor
    shares: Tensor
    ids: Tensor
    targets: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    codecs: dict[str, Codec] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device.

        Args:
            device: where images, labels and targets go.
        """
        targets = {
            t: {n: a.to(device, non_blocking=True) for n, a in arrays.items()} for t, arrays in self.targets.items()
        }
        images, labels, others, shares = (t.to(device) for t in (self.images, self.labels, self.others, self.shares))
        return Batch(images, labels, others, shares, self.ids, targets, self.codecs)

    def part(self, some: slice) -> Batch:
        """Some of its samples."""
        targets = {id: {name: array[some] for name, array in arrays.items()} for id, arrays in self.targets.items()}
        return Batch(
            self.images[some], self.labels[some], self.others[some], self.shares[some], self.ids[some], targets,
            self.codecs,
        )  # fmt: skip

    def target(self, id: str) -> Tensor:
        """A target's decoded values, f32 `[B, …]`.

        Args:
            id: of the target.
        """
        values: Tensor = self.codecs[id].decode(self.targets[id])
        return values

    def soft_labels(self, classes: int) -> Tensor:
        """Labels mixed as the images are, f32 `[B, K]`.

        Args:
            classes: K, how many there are.
        """
        own, other = (F.one_hot(labels, classes).float() for labels in (self.labels, self.others))
        return own + self.shares[:, None] * (other - own)

    def pixels(self, mean: Sequence[float], std: Sequence[float]) -> Tensor:
        """Normalised images f32 `[B, 3, S, S]`, for a network's input.

        Args:
            mean: of the network's input, per channel.
            std: of the network's input, per channel.
        """
        x = self.images.permute(0, 3, 1, 2).float() / 255
        shape = (1, 3, 1, 1)
        return (x - x.new_tensor(mean).view(shape)) / x.new_tensor(std).view(shape)
