"""Batches of validation images: every image exactly once, on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from storage.shards.index import cached_index, require_labels
from storage.views.policy import Policy
from student.data.batch import Batch
from student.data.block_reader import BlockPart, BlockReader, join
from student.data.shuffle import Segment
from student.data.source import Source
from student.targets.evaluation_views import EvaluationTargets


def evaluation_batches(
    urls: Sequence[str],
    policy: Policy,
    batch: int,
    rank: int = 0,
    ranks: int = 1,
    most: int | None = None,
    chosen: Sequence[np.ndarray] | None = None,
    stored: EvaluationTargets | None = None,
    labelled: bool = True,
) -> Iterator[Batch]:
    """Every sample of shards once, in order, in the one view of a policy without chance.

    With several ranks, one in so many blocks, counted over all shards; with `most`, the first so many blocks alone;
    with `chosen`, the samples of these indices in each shard alone, sorted; with what is `stored` of them beside it.
    All have labels, unless that is not asked for.
    """
    before = 0  # blocks of earlier shards
    for shard, url in enumerate(urls):
        index = cached_index(url)
        if labelled:
            require_labels(url, index)
        reader = BlockReader(stored.source(url, index.id) if stored else Source((url,), (index.id,), policy))
        held: list[BlockPart] = []
        wanted = np.arange(len(index)) if chosen is None else chosen[shard]
        mine: dict[int, np.ndarray] = {}
        for number in range(index.blocks):
            if (before + number) % ranks == rank and (most is None or before + number < most):
                block = index.block(number)
                mine[number] = wanted[slice(*np.searchsorted(wanted, (block.start, block.stop)))]
        before += index.blocks
        mine = {number: samples for number, samples in mine.items() if len(samples)}
        for number, samples in mine.items():
            arrays, targets = reader.read(Segment(0, number, samples), 0)
            arrays["ids"][:, 0] = shard
            held.append((arrays, targets))
            if sum(len(part[0]["labels"]) for part in held) >= batch or number == max(mine):
                joined, beside = join(held)
                tensors = {name: torch.from_numpy(array) for name, array in joined.items()}
                there = {id: {n: torch.from_numpy(a) for n, a in arrays.items()} for id, arrays in beside.items()}
                yield Batch(**tensors, targets=there, codecs=dict(reader.source.targets))
                held = []
