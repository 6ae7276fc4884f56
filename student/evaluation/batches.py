"""Batches of validation images, or of what a store keeps of them: every image exactly once, on any number of ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from storage.errors import UserError
from storage.shards.shard import Shard, require_labels
from student.data.batch import Batch
from student.data.block_reader import BlockPart, BlockReader, join
from student.data.shuffle import Segment
from student.data.source import Source

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

    from storage.views.policy import Policy
    from student.targets.evaluation_views import EvaluationTargets

    # What a network says of some samples, f32 `[B, …]`, with their labels, int64 `[B]`.
    Answers = Iterable[tuple[Tensor, Tensor]]

STORED = 4096  # samples whose stored values are read together


def evaluation_batches(
    shards: Sequence[Shard],
    policy: Policy,
    batch_size: int = 256,
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
        samples = np.arange(len(shard)) if chosen is None else chosen[position]
        by_block = np.split(samples, np.searchsorted(samples, [index.block(n).start for n in range(1, index.blocks)]))
        segments = [
            Segment(shard=0, block=n, samples=in_block)
            for n, in_block in enumerate(by_block)
            if len(in_block) and (before + n) % world_size == rank and (max_blocks is None or before + n < max_blocks)
        ]
        before += index.blocks
        parts: list[BlockPart] = []
        for segment in segments:
            parts.append(reader.read(segment, 0))
            if sum(len(arrays["labels"]) for arrays, _ in parts) >= batch_size or segment is segments[-1]:
                arrays, encoded = join(parts)
                arrays["ids"][:, 0] = position
                tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
                targets = {id: {n: torch.from_numpy(a) for n, a in named.items()} for id, named in encoded.items()}
                yield Batch(**tensors, targets=targets, codecs=dict(reader.source.targets))
                parts = []


def stored_answers(
    stored: EvaluationTargets, target: str, shards: Sequence[Shard], chosen: Sequence[np.ndarray] | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """What a store keeps of every sample of shards once, in order, with labels: no image is read.

    Args:
        stored: with the target.
        target: its id.
        shards: labeled ones.
        chosen: sorted indices of the samples of each shard that are read; None for all.

    Raises:
        UserError: a missing label.
        DamageError: an object of the store is missing or damaged.
        IdentityError: the views have changed since the target was made.
    """
    for position, shard in enumerate(shards):
        require_labels(shard)
        reader, labels = BlockReader(stored.source(shard)), np.array(shard.index.labels, np.int64)
        samples = np.arange(len(shard)) if chosen is None else chosen[position]
        for part in np.split(samples, range(STORED, len(samples), STORED)):
            if len(part):
                arrays = reader.targets(Segment(shard=0, block=0, samples=part), 0)[target]
                values: np.ndarray = stored.codecs[target].decode(arrays)
                yield torch.from_numpy(values), torch.from_numpy(labels[part])


def require_known_labels(batch: Batch, num_classes: int, shards: Sequence[Shard], name: str) -> None:
    """UserError where a classifier of this name has no class for a batch's largest label."""
    largest = int(batch.labels.max())
    if largest >= num_classes:
        url = shards[int(batch.ids[int(batch.labels.argmax()), 0])].url
        raise UserError(f"{url}: label {largest} is out of range: {name} has classes 0 to {num_classes - 1}")
