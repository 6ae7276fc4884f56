"""One batch: images, labels and stored targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from torch.nn import functional as F

from storage.views.normalize import normalize

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from torch import Tensor

    from storage.store.codecs import Codec

_ON_DEVICE = ("images", "labels", "mix_labels", "mix_weights", "targets")


def map_arrays(function: Callable[..., Any], *trees: Any) -> Any:
    """`function` of each array in a nested mapping, or of the arrays of the same name in several."""
    if isinstance(trees[0], Mapping):
        return {name: map_arrays(function, *(tree[name] for tree in trees)) for name in trees[0]}
    return function(*trees)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Some samples: their view images, labels and stored targets.

    Attributes:
        images: uint8 `[B, S, S, 3]`, the pixels that the teacher saw.
        labels: int64 `[B]`; −1 where the shards have none.
        mix_labels: int64 `[B]`: labels of the images that were mixed in; equal to `labels` where nothing was.
        mix_weights: f32 `[B]`: share of the mixed-in image in each image, and of its label in each label.
        ids: int64 `[B, 3]`: number of the shard in the stream, index in the shard, view.
        targets: target id -> the codec's arrays, each `[B, …]`.
        codecs: target id -> codec.
    """

    images: Tensor
    labels: Tensor
    mix_labels: Tensor
    mix_weights: Tensor
    ids: Tensor
    targets: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    codecs: dict[str, Codec] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device; the host does not wait for copies of pinned memory.

        Args:
            device: where images, labels and targets go.
        """
        return self._with(lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()), _ON_DEVICE)

    def pin_memory(self) -> Batch:
        """The batch in memory that a GPU copies from by itself."""
        return self._with(lambda tensor: tensor.pin_memory(), _ON_DEVICE)

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell PyTorch that a stream reads this batch, so that its memory on the GPU is kept until it has."""
        map_arrays(lambda tensor: tensor.record_stream(stream), {name: getattr(self, name) for name in _ON_DEVICE})

    def part(self, samples: slice) -> Batch:
        """Some of its samples."""
        return self._with(itemgetter(samples), (*_ON_DEVICE, "ids"))

    def _with(self, function: Callable[[Tensor], Tensor], names: Sequence[str]) -> Batch:
        return replace(self, **map_arrays(function, {name: getattr(self, name) for name in names}))

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
        own, mixed_in = (F.one_hot(labels, classes).float() for labels in (self.labels, self.mix_labels))
        return own + self.mix_weights[:, None] * (mixed_in - own)

    def pixels(self, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> Tensor:
        """Normalized images f32 `[B, 3, S, S]`, for a network's input.

        Args:
            mean: of the network's input, per channel; a tensor is `[3, 1, 1]`.
            std: of the network's input, per channel.
        """
        return normalize(self.images, mean, std)
