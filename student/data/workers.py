"""Lanes and loader workers: how shares of a batch are read and joined."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from storage.errors import UserError
from student.data.block_reader import Arrays, BlockPart, BlockReader, join
from student.data.shuffle import BlockShuffle, Segment, lanes_of
from student.data.source import Source


class _Lane:
    """One lane from some batch on: gives its share of batch after batch."""

    def __init__(
        self, reader: BlockReader, order: BlockShuffle, views: int | None, epoch: int, lane: int, start: int
    ) -> None:
        self.reader, self.order, self.views, self.epoch = reader, order, views, epoch
        self.windows = order.lane(epoch, lane, start)
        self.rows = np.zeros(0, np.int64)
        self.arrays: Arrays = {}
        self.targets: dict[str, Arrays] = {}

    def take(self) -> BlockPart:
        """The lane's share of the next batch."""
        parts: list[BlockPart] = []
        need = self.order.share
        while need:
            if not len(self.rows):
                self._load(*next(self.windows))
            rows, self.rows = self.rows[:need], self.rows[need:]
            need -= len(rows)
            parts.append((
                {name: array[rows] for name, array in self.arrays.items()},
                {t: {name: array[rows] for name, array in arrays.items()} for t, arrays in self.targets.items()},
            ))  # fmt: skip
        return parts[0] if len(parts) == 1 else join(parts)

    def _load(self, segments: list[Segment], order: np.ndarray) -> None:
        self.arrays, self.targets = {}, {}  # free the last window before the next one is read
        read = []
        for segment in segments:
            view = self.epoch
            if self.views is not None:
                view = self.order.view(self.epoch, segment.shard, segment.block, self.views)
            read.append(self.reader.read(segment, view))
        self.arrays, self.targets = join(read)
        self.rows = order


class _Parts(IterableDataset[list[BlockPart]]):
    """What one loader worker yields: for every batch, the shares of its lanes."""

    def __init__(
        self, source: Source, order: BlockShuffle, views: int | None, rank: int, ranks: int, place: Tensor
    ) -> None:
        self.source, self.order, self.views, self.rank, self.ranks = source, order, views, rank, ranks
        self.place = place  # shared memory: the epoch and the batch to begin with
        self.reader: BlockReader | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "reader": None}

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        epoch, start = (int(n) for n in self.place)
        self.reader = self.reader or BlockReader(self.source)
        try:
            mine = lanes_of(self.order.lanes, self.rank, self.ranks, worker, workers)
            lanes = [_Lane(self.reader, self.order, self.views, epoch, lane, start) for lane in mine]
            for _ in range(start, self.order.steps):
                yield [lane.take() for lane in lanes]
        except (UserError, OSError) as error:  # torch would turn it into a traceback in a string
            yield error


def _leave_at_once(_worker: int) -> None:
    """A worker that is told to stop ends without the interpreter's teardown.

    Its queue's thread may be inside PyTorch just then; a thread that the teardown ends inside C++ aborts the
    process, and the parent reports a worker that was killed. By then all is handed over, or no longer wanted.
    """
    atexit.register(os._exit, 0)


def _tensors(shares: Any) -> Any:
    """Arrays as tensors, so that workers hand them over in shared memory."""
    if isinstance(shares, UserError | OSError):
        return shares

    def convert(arrays: Arrays) -> dict[str, Tensor]:
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    return [(convert(arrays), {t: convert(a) for t, a in targets.items()}) for arrays, targets in shares]
