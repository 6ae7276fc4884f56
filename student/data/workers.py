"""Lanes and loader workers: how the shares of a batch are read and joined."""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from storage.errors import UserError
from student.data.block_reader import Arrays, BlockPart, BlockReader, join
from student.data.shuffle import BlockShuffle, Segment, lanes_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from student.data.source import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadPlan:
    """What one rank reads: plain data that loader workers receive.

    Attributes:
        source: where the samples are.
        order: the order of all ranks' samples.
        views: how many views of the bank are used; None for fresh views.
        rank: of this process.
        world_size: how many processes share each batch.
    """

    source: Source
    order: BlockShuffle
    views: int | None
    rank: int
    world_size: int

    def view(self, epoch: int, segment: Segment) -> int:
        """The view of a segment's block in an epoch."""
        if self.views is None:
            return epoch
        return self.order.view(epoch, segment.shard, segment.block, self.views)


class _Lane:
    """One lane from some batch on: gives its share of batch after batch."""

    def __init__(self, reader: BlockReader, plan: ReadPlan, epoch: int, lane: int, start: int) -> None:
        self.reader, self.plan, self.epoch = reader, plan, epoch
        self.windows = plan.order.lane(epoch, lane, start)
        self.rows = np.zeros(0, np.int64)  # of the window that is held, in the order in which they are taken
        self.arrays: Arrays = {}
        self.targets: dict[str, Arrays] = {}

    def take(self) -> BlockPart:
        """The lane's share of the next batch."""
        parts: list[BlockPart] = []
        missing = self.plan.order.share
        while missing:
            if not len(self.rows):
                self._load(*next(self.windows))
            rows, self.rows = self.rows[:missing], self.rows[missing:]
            missing -= len(rows)
            arrays = {name: array[rows] for name, array in self.arrays.items()}
            targets = {id: {name: array[rows] for name, array in ones.items()} for id, ones in self.targets.items()}
            parts.append((arrays, targets))
        return parts[0] if len(parts) == 1 else join(parts)

    def _load(self, segments: list[Segment], rows: np.ndarray) -> None:
        self.arrays, self.targets = {}, {}  # free the last window before the next one is read
        parts = [self.reader.read(segment, self.plan.view(self.epoch, segment)) for segment in segments]
        self.arrays, self.targets = join(parts)
        self.rows = rows


class LaneReader(IterableDataset[list[BlockPart]]):
    """What one loader worker yields: for every batch, the shares of its lanes.

    Args:
        plan: what its rank reads.
        start: int64 `[2]` in shared memory, the epoch and the batch to start with.
    """

    def __init__(self, plan: ReadPlan, start: Tensor) -> None:
        self.plan, self.start = plan, start
        self.reader: BlockReader | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "reader": None}

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        epoch, start = (int(n) for n in self.start)
        plan, order = self.plan, self.plan.order
        self.reader = self.reader or BlockReader(plan.source)
        try:
            numbers = lanes_of(order.lanes, plan.rank, plan.world_size, worker, workers)
            lanes = [_Lane(self.reader, plan, epoch, number, start) for number in numbers]
            for _ in range(start, order.steps):
                yield [lane.take() for lane in lanes]
        except (UserError, OSError) as error:  # torch would turn it into a traceback in a string
            yield error


def leave_at_once(_worker: int) -> None:
    """Make a worker that is told to stop end without the interpreter's teardown.

    Its queue's thread may be inside PyTorch just then; a thread that the teardown ends inside C++ aborts the
    process, and the parent reports a worker that was killed. By then all is handed over, or no longer wanted.
    """
    atexit.register(os._exit, 0)


def to_tensors(shares: Any) -> Any:
    """Arrays as tensors, so that workers hand them over in shared memory."""
    if isinstance(shares, UserError | OSError):
        return shares

    def convert(arrays: Arrays) -> dict[str, Tensor]:
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    return [(convert(arrays), {id: convert(ones) for id, ones in targets.items()}) for arrays, targets in shares]
