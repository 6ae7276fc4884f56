"""Lanes and loader workers: how the shares of a batch are read and joined."""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from storage.errors import UserError
from student.data.batch import map_arrays
from student.data.block_reader import BlockReader
from student.data.shuffle import BlockShuffle, Segment, lanes_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

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


def lane_shares(plan: ReadPlan, reader: BlockReader, lane: int, epoch: int, start: int) -> Iterator[dict[str, Any]]:
    """A lane's share of each batch from `start` on: arrays by the names of `Batch`."""
    parts: list[Any] = []
    missing = plan.order.share
    for segments, order in plan.order.lane(epoch, lane, start):
        window: Any = None  # free the last one before the next one is read
        blocks = (reader.read(segment, plan.view(epoch, segment)) for segment in segments)
        window = _joined([{**arrays, "targets": targets} for arrays, targets in blocks])
        while len(order):
            rows, order = order[:missing], order[missing:]
            parts.append(map_arrays(itemgetter(rows), window))
            missing -= len(rows)
            if not missing:
                yield _joined(parts)
                parts, missing = [], plan.order.share


def _joined(parts: list[Any]) -> Any:
    """Samples of several parts after another."""
    return parts[0] if len(parts) == 1 else map_arrays(lambda *arrays: np.concatenate(arrays), *parts)


class LaneReader(IterableDataset[list[dict[str, Any]]]):
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
        lanes = lanes_of(order.lanes, plan.rank, plan.world_size, worker, workers)
        shares = [lane_shares(plan, self.reader, lane, epoch, start) for lane in lanes]
        try:
            for _ in range(start, order.steps):
                yield [next(lane) for lane in shares]
        except (UserError, OSError) as error:  # torch would turn it into a traceback in a string
            yield error


def leave_at_once(_worker: int) -> None:
    """Make a worker that is told to stop end without the interpreter's teardown.

    Its queue's thread may be inside PyTorch just then; a thread that the teardown ends inside C++ aborts the
    process, and the parent reports a worker that was killed. By then all is handed over, or no longer wanted.
    """
    atexit.register(os._exit, 0)
