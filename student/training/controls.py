"""Means over the training set: a control in place of targets (`ControlConfig`), or of a teacher's maps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from student.data.batch import map_arrays
from student.data.block_reader import BlockReader

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from storage.progress import Progress
    from student.alignment.attention import AttentionAligner
    from student.data.stream import Stream

Values = dict[str, Tensor]


def mean_targets(stream: Stream, progress: Progress) -> Values:
    """Target id -> the mean of its decoded values over all samples and views of a stream, f32 of one sample's shape.

    Raises:
        DamageError: an object of the store is missing or damaged.
    """
    return _means(stream, progress, "mean targets", lambda values: values)


def fill_means(
    aligners: Mapping[str, tuple[AttentionAligner, Sequence[str]]], stream: Stream, progress: Progress
) -> None:
    """Fill the mean of aligners with `average: examples`, over all samples and views of a stream.

    Args:
        aligners: name -> aligner, and the ids of its targets.
        stream: of the training set.
        progress: for reports.

    Raises:
        DamageError: an object of the store is missing or damaged.
    """

    def maps(values: Values) -> Values:
        return {name: rows.rows_of_each([values[id] for id in ids]) for name, (rows, ids) in aligners.items()}

    for name, mean in _means(stream, progress, "mean maps", maps).items():
        aligners[name][0].get_buffer("mean").copy_(mean)


def _means(stream: Stream, progress: Progress, title: str, values_of: Callable[[Values], Values]) -> Values:
    """Name -> the mean over all samples and views of `values_of` a block's decoded targets."""
    reader, views = BlockReader(stream.source), stream.views or 0
    sums: Values = {}
    progress.start(title, len(stream.order.blocks) * views)
    for segment in stream.order.blocks:
        for view in range(views):
            arrays = map_arrays(torch.from_numpy, reader.targets(segment, view))
            decoded = {id: codec.decode(arrays[id]) for id, codec in stream.source.targets.items()}
            for name, values in values_of(decoded).items():
                total = values.sum(0, dtype=torch.float64)
                sums[name] = sums[name] + total if name in sums else total
            progress.advance(1)
    return {name: (total / (stream.order.samples * views)).float() for name, total in sums.items()}
