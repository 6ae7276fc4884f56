"""Controls: what a method gains when its targets cannot know the image. See `config.Control`."""

from __future__ import annotations

import torch
from torch import Tensor

from storage.progress import Progress
from student.reader import BlockReader
from student.stream import Stream


def mean_targets(stream: Stream, progress: Progress) -> dict[str, Tensor]:
    """Target id -> the mean of its decoded values over all samples and views of a stream, f32 of one sample's shape.

    Raises:
        DamageError: an object of the store is missing or damaged.
    """
    reader, views = BlockReader(stream.source), stream.views or 0
    sums: dict[str, Tensor] = {}
    progress.start("mean targets", len(stream.order.blocks) * views)
    for segment in stream.order.blocks:
        for view in range(views):
            for target, arrays in reader.targets(segment, view).items():
                codec = stream.source.targets[target]
                values = codec.decode({name: torch.from_numpy(array) for name, array in arrays.items()})
                total = values.double().sum(0)
                sums[target] = sums[target] + total if target in sums else total
            progress.advance(1)
    return {target: (total / (stream.order.samples * views)).float() for target, total in sums.items()}
