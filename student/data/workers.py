"""Lanes and loader workers: how the shares of a batch are read, handed over and joined."""

from __future__ import annotations

import atexit
import math
import os
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from storage.errors import UserError
from student.data.batch import map_arrays
from student.data.block_reader import BlockReader
from student.data.shuffle import BlockShuffle, Segment, lanes_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from student.data.source import Source

ALIGNMENT = 64  # bytes, as of torch's own memory


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


# A lane's share of a batch, not yet copied: the arrays of windows by the names of `Batch`, and which of their rows.
Share = list[tuple[dict[str, Any], np.ndarray]]


def lane_shares(plan: ReadPlan, reader: BlockReader, lane: int, epoch: int, start: int) -> Iterator[Share]:
    """A lane's share of each batch from `start` on.

    Drop a share before the next one is asked for: it keeps its window alive.
    """
    parts: Share = []
    missing = plan.order.share
    for segments, order in plan.order.lane(epoch, lane, start):
        parts = [(map_arrays(itemgetter(rows), last), np.arange(len(rows))) for last, rows in parts]
        window: Any = None  # free the last one before the next one is read
        blocks = (reader.read(segment, plan.view(epoch, segment)) for segment in segments)
        window = _joined([{**arrays, "targets": targets} for arrays, targets in blocks])
        while len(order):
            rows, order = order[:missing], order[missing:]
            parts.append((window, rows))
            missing -= len(rows)
            if not missing:
                yield parts
                parts, missing = [], plan.order.share


def _joined(blocks: list[Any]) -> Any:
    """The arrays of blocks after another, each contiguous."""
    if len(blocks) == 1:
        return map_arrays(np.ascontiguousarray, blocks[0])
    return map_arrays(lambda *arrays: np.concatenate(arrays), *blocks)


@dataclass(frozen=True, slots=True)
class Piece:
    """Where an array lies in a buffer.

    Attributes:
        dtype: NumPy's code of its type.
        shape: of the array.
        start: its first byte.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def bytes(self) -> int:
        """How many it takes."""
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)

    def of(self, buffer: np.ndarray) -> np.ndarray:
        """The array itself, a view of the buffer."""
        return buffer[self.start : self.start + self.bytes].view(self.dtype).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class HandOver:
    """A worker's shares of one batch in a single buffer: each tensor that crosses costs 0.3 ms, whatever its size.

    Attributes:
        buffer: uint8 `[bytes]` in shared memory.
        pieces: where each array of the shares lies in it, by the names of `Batch`.
    """

    buffer: Tensor
    pieces: dict[str, Any]

    @classmethod
    def of(cls, shares: Sequence[Share]) -> HandOver:
        """Shares after another, copied from their windows into a new buffer."""
        size = 0

        def piece(dtype: np.dtype, shape: tuple[int, ...]) -> Piece:
            nonlocal size
            here = Piece(dtype.str, shape, size)
            size += -(-here.bytes // ALIGNMENT) * ALIGNMENT
            return here

        pieces = map_arrays(lambda *arrays: piece(*_layout(shares, arrays)), *_windows(shares))
        # as torch's own collation does; `share_memory_` would copy once more
        storage = torch.UntypedStorage._new_shared(size)  # type: ignore[no-untyped-call]  # noqa: SLF001
        buffer = torch.empty(0, dtype=torch.uint8).set_(storage)
        memory = buffer.numpy()
        map_arrays(lambda here, *arrays: _fill(here.of(memory), shares, arrays), pieces, *_windows(shares))
        return cls(buffer, pieces)

    def arrays(self) -> Any:
        """The arrays, views of the buffer."""
        memory = self.buffer.numpy()
        return map_arrays(lambda here: here.of(memory), self.pieces)


def gathered(shares: Sequence[Share]) -> Any:
    """Shares after another as tensors of their own, copied once, from their windows."""

    def tensor(*arrays: np.ndarray) -> Tensor:
        out = _empty(*_layout(shares, arrays))
        _fill(out.numpy(), shares, arrays)
        return out

    return map_arrays(tensor, *_windows(shares))


def dealt_back(parts: Sequence[HandOver], lanes: int) -> Any:
    """What the workers handed over for a batch, as tensors of their own, in the order of the lanes.

    Copied out of the shared memory, so that a batch that is kept holds neither a file descriptor nor space in /dev/shm.
    """

    def tensor(*arrays: np.ndarray) -> Tensor:
        tail, share = arrays[0].shape[1:], sum(map(len, arrays)) // lanes
        out = _empty(np.result_type(*(array.dtype for array in arrays)), (share * lanes, *tail))
        by_lane = out.numpy().reshape(lanes, share, *tail)
        for worker, array in enumerate(arrays):  # as `lanes_of` deals out
            by_lane[worker :: len(arrays)] = array.reshape(len(array) // share, share, *tail)
        return out

    return map_arrays(tensor, *(part.arrays() for part in parts))


def _windows(shares: Sequence[Share]) -> list[dict[str, Any]]:
    return [window for share in shares for window, _ in share]


def _layout(shares: Sequence[Share], arrays: Sequence[np.ndarray]) -> tuple[np.dtype, tuple[int, ...]]:
    """Type and shape of the shares' rows of one array; scales may be f16 in one shard and f32 in another."""
    count = sum(len(rows) for share in shares for _, rows in share)
    return np.result_type(*(array.dtype for array in arrays)), (count, *arrays[0].shape[1:])


def _fill(out: np.ndarray, shares: Sequence[Share], arrays: Sequence[np.ndarray]) -> None:
    """Copy the shares' rows of one array, of each window in turn."""
    start = 0
    for array, rows in zip(arrays, (rows for share in shares for _, rows in share), strict=True):
        place = out[start : start + len(rows)]
        if array.dtype == out.dtype:
            np.take(array, rows, 0, place, "clip")  # all are in range; "raise" would copy twice
        else:
            place[:] = array[rows]
        start += len(rows)


def _empty(dtype: np.dtype, shape: tuple[int, ...]) -> Tensor:
    """Memory by torch, which aligns it as its kernels like it."""
    return torch.empty(shape, dtype=torch.from_numpy(np.empty(0, dtype)).dtype)


class LaneReader(IterableDataset[Any]):
    """What one loader worker yields for every batch: the shares of its lanes, as a `HandOver`; in-process, as tensors.

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
        copied = HandOver.of if info else gathered
        epoch, start = (int(n) for n in self.start)
        plan, order = self.plan, self.plan.order
        self.reader = self.reader or BlockReader(plan.source)
        lanes = lanes_of(order.lanes, plan.rank, plan.world_size, worker, workers)
        shares = [lane_shares(plan, self.reader, lane, epoch, start) for lane in lanes]
        try:
            for _ in range(start, order.steps):
                yield copied([next(lane) for lane in shares])  # no name for it: a share keeps its window alive
        except (UserError, OSError) as error:  # torch would turn it into a traceback in a string
            yield error


def leave_at_once(_worker: int) -> None:
    """Make a worker that is told to stop end without the interpreter's teardown.

    Its queue's thread may be inside PyTorch just then; a thread that the teardown ends inside C++ aborts the
    process, and the parent reports a worker that was killed. By then all is handed over, or no longer wanted.
    """
    atexit.register(os._exit, 0)
