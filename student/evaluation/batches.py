"""Batches of validation images: every image exactly once, on any number of ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from storage.shards.shard import Shard, require_labels
from student.data.batch import Batch
from student.data.block_reader import BlockPart, BlockReader, join
from student.data.shuffle import Segment
from student.data.source import Source

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from storage.views.policy import Policy
    from student.targets.evaluation_views import EvaluationTargets


def evaluation_batches(
    shards: Sequence[Shard],
    policy: Policy,
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    max_blocks: int | None = None,
    chosen: Sequence[np.ndarray] | None = None,
    stored: EvaluationTargets | None = None,
    labeled: bool = True,
) -> Iterator[Batch]:
    """Every sample of shards once, in order, in the one view of a policy without chance.

    Args:
        shards: to read.
        policy: the evaluation view.
        batch_size: about how many samples at a time; a batch ends with its shard.
        rank: of this process: it takes one in `world_size` blocks, counted over all shards.
        world_size: how many processes evaluate together.
        max_blocks: only the first so many blocks of all shards; None for all.
        chosen: sorted indices of the samples of each shard that are read; None for all.
        stored: targets that come with the samples.
        labeled: whether every sample has to have a label.

    Raises:
        UserError: a missing label, an image that cannot be decoded.
    """
    before = 0  # blocks of earlier shards
    for position, shard in enumerate(shards):
        if labeled:
            require_labels(shard)
        index = shard.index
        reader = BlockReader(stored.source(shard) if stored else Source(shards=(shard,), policy=policy))
        parts: list[BlockPart] = []
        wanted = np.arange(len(shard)) if chosen is None else chosen[position]
        samples_of: dict[int, np.ndarray] = {}  # of this rank's blocks
        for number in range(index.blocks):
            if (before + number) % world_size == rank and (max_blocks is None or before + number < max_blocks):
                block = index.block(number)
                samples_of[number] = wanted[slice(*np.searchsorted(wanted, (block.start, block.stop)))]
        before += index.blocks
        samples_of = {number: samples for number, samples in samples_of.items() if len(samples)}
        for number, samples in samples_of.items():
            arrays, targets = reader.read(Segment(shard=0, block=number, samples=samples), 0)
            arrays["ids"][:, 0] = position
            parts.append((arrays, targets))
            if sum(len(part[0]["labels"]) for part in parts) >= batch_size or number == max(samples_of):
                joined, encoded = join(parts)
                tensors = {name: torch.from_numpy(array) for name, array in joined.items()}
                stored_values = {
                    id: {n: torch.from_numpy(a) for n, a in arrays.items()} for id, arrays in encoded.items()
                }
                yield Batch(**tensors, targets=stored_values, codecs=dict(reader.source.targets))
                parts = []
