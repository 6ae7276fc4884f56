"""The order of an epoch: lanes and windows, a function of (shards, seed, epoch, lanes, shuffle_blocks, batch_size).

The blocks of an epoch are permuted; the line of their samples is cut into L equal lanes; each lane shuffles windows of
whole blocks; global batch g takes batch/L samples from every lane. Which worker or rank reads a lane changes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from storage.errors import UserError, setting
from storage.rng import generator

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Consecutive valid samples of one block.

    Attributes:
        shard: its number in the stream.
        block: its number in the shard.
        samples: their indices in the shard.
        valid: indices of all valid samples of the block; None where `samples` are all.
    """

    shard: int
    block: int
    samples: np.ndarray
    valid: np.ndarray | None = None


def default_lanes(batch: int) -> int:
    """The largest power of two that divides batch/8, within 8 and 128; of fewer than eight samples, each is one."""
    return max(min(8, batch), math.gcd(batch, 8 * 128) // 8)


class BlockShuffle:
    """The order of a stream's samples.

    Args:
        blocks: (shard, block, indices of its valid samples in the shard) of every block, invalid samples left out.
        batch_size: of all ranks together.
        seed: of the order.
        lanes: L, a divisor of the batch; by default as `default_lanes`.
        shuffle_blocks: blocks that a lane shuffles together.

    Raises:
        UserError: fewer samples than a batch, or lanes that do not divide it.
    """

    def __init__(
        self,
        blocks: Sequence[tuple[int, int, np.ndarray]],
        batch_size: int,
        seed: int = 0,
        lanes: int | None = None,
        shuffle_blocks: int = 4,
    ) -> None:
        if batch_size < 1 or shuffle_blocks < 1:
            raise UserError(f"batch size {batch_size} and stream.shuffle_blocks {shuffle_blocks} are at least 1")
        lanes = lanes or default_lanes(batch_size)
        if batch_size % lanes:
            multiple = setting("stream.batch_size", max(1, round(batch_size / lanes)) * lanes)
            hint = f"Give a multiple of {lanes}, such as {multiple}, or lanes that divide it: "
            raise UserError(
                f"batch size {batch_size} cannot be cut into the {lanes} equal parts of stream.lanes",
                hint=hint + setting("stream.lanes", "N"),
            )
        self.blocks = [Segment(shard=shard, block=block, samples=samples) for shard, block, samples in blocks]
        self.counts = np.array([len(block.samples) for block in self.blocks], np.int64)
        self.batch_size, self.seed, self.lanes, self.shuffle_blocks = batch_size, seed, lanes, shuffle_blocks
        self.samples = int(self.counts.sum())
        if self.samples < batch_size:
            most = 1 << max(self.samples.bit_length() - 1, 0)
            hint = f"Lower the batch size: {setting('stream.batch_size', most)}"
            raise UserError(f"{self.samples} samples are fewer than one batch of {batch_size}", hint=hint)

    @property
    def steps(self) -> int:
        """Batches in an epoch; the samples of less than a batch are left out, other ones in each epoch."""
        return self.samples // self.batch_size

    @property
    def share(self) -> int:
        """Samples of each batch that come from one lane."""
        return self.batch_size // self.lanes

    def lane(self, epoch: int, lane: int, start: int = 0) -> Iterator[tuple[list[Segment], np.ndarray]]:
        """The windows of one lane: the segments to read, and the order of their samples joined.

        Begins at batch `start`: windows before it are not given, and the first one's order begins where it is needed.
        """
        length = self.steps * self.share
        permuted = generator("blocks", self.seed, epoch).permutation(len(self.blocks))
        ends = np.cumsum(self.counts[permuted])
        begin, end = lane * length, (lane + 1) * length
        segments = []
        for place in range(int(np.searchsorted(ends, begin, side="right")), len(permuted)):
            block = self.blocks[permuted[place]]
            first = int(ends[place]) - len(block.samples)
            if first >= end:
                break
            part = block.samples[max(0, begin - first) : end - first]
            segments.append(replace(block, samples=part, valid=block.samples))
        skip = start * self.share
        for number, at in enumerate(range(0, len(segments), self.shuffle_blocks)):
            chosen = segments[at : at + self.shuffle_blocks]
            count = sum(len(segment.samples) for segment in chosen)
            if skip >= count:
                skip -= count
                continue
            order = generator("window", self.seed, epoch, lane, number).permutation(count)
            yield chosen, order[skip:]
            skip = 0

    def view(self, epoch: int, shard: int, block: int, views: int) -> int:
        """The view of a block in an epoch: each round of `views` epochs goes through all of them, newly permuted."""
        round_, place = divmod(epoch, views)
        return int(generator("views", self.seed, shard, block, round_).permutation(views)[place])


def lanes_of(lanes: int, rank: int, ranks: int, worker: int = 0, workers: int = 1) -> list[int]:
    """The lanes of one rank, or of one worker of a rank: those ≡ rank mod ranks, dealt out to its workers.

    Raises:
        UserError: a number of ranks that does not divide the lanes.
    """
    if lanes % ranks:
        raise UserError(f"{ranks} ranks do not divide {lanes} lanes; give stream.lanes a multiple of {ranks}")
    return list(range(rank, lanes, ranks))[worker::workers]
