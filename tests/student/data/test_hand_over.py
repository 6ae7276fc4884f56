"""What loader workers hand over: one buffer a batch, never written again, and no array changed on the way."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from student.data.batch import Batch, map_arrays
from student.data.block_reader import BlockReader
from student.data.stream import Stream
from student.data.workers import ALIGNMENT, HandOver, dealt_back, gathered

OPEN = Path("/proc/self/fd")
NAMES = ("images", "labels", "mix_labels", "mix_weights", "ids", "targets")


def stream(world, **changes) -> Stream:
    targets = [world.targets[name] for name in ("activations u8", "class_row", "logits")]
    return Stream(world.shards, **{"batch_size": 32, "store": world.store, "targets": targets, "seed": 7, **changes})


def tensors(batch: Batch) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    map_arrays(found.append, {name: getattr(batch, name) for name in NAMES})
    return found


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_batch_that_was_yielded_never_changes_and_owns_its_memory(world, workers):
    s, kept, copies = stream(world, workers=workers), [], []
    for epoch in (0, 1):
        for batch in s.epoch(epoch):
            kept.append(batch)
            copies.append([tensor.clone() for tensor in tensors(batch)])
    for batch, copied in zip(kept, copies, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors(batch), copied, strict=True))
    every = [tensor for batch in kept for tensor in tensors(batch)]
    assert len({tensor.untyped_storage().data_ptr() for tensor in every}) == len(every)
    assert not any(tensor.is_shared() for tensor in every)
    assert all(tensor.data_ptr() % ALIGNMENT == 0 and tensor.is_contiguous() for tensor in every)
    first = copies[0]
    for tensor in tensors(kept[-1]):  # nor does writing into one change another
        tensor.zero_()
    assert all(torch.equal(a, b) for a, b in zip(tensors(kept[0]), first, strict=True))


@pytest.mark.parametrize("workers", [1, 3])
def test_one_tensor_a_worker_crosses_for_a_batch(world, workers, monkeypatch):
    rebuild, calls = torch.multiprocessing.reductions.rebuild_tensor, []

    def counted(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        made: torch.Tensor = rebuild(*arguments)
        return made

    s = stream(world, workers=workers)
    list(s.epoch(0))  # the workers start with tensors of their own
    monkeypatch.setattr("torch.multiprocessing.reductions.rebuild_tensor", counted)
    batches = list(s.epoch(1))
    assert len(batches) == len(s) == 9
    assert len(calls) == workers * len(batches)


@pytest.mark.skipif(not OPEN.exists(), reason="counts what Linux says is open")
def test_batches_that_are_kept_hold_no_file_descriptors(world):
    s = stream(world, workers=1)
    kept = list(s.epoch(0))
    before = len(list(OPEN.iterdir()))
    kept += [*s.epoch(1), *s.epoch(2)]
    assert len(kept) == 27
    assert len(list(OPEN.iterdir())) < before + 9


def made_up_shares(lanes: int, share: int) -> tuple[list[Any], dict[str, Any]]:
    """Shares of two windows each, scales of every third lane in f32; and what they are in one piece."""
    shares, pieces = [], []
    for lane in range(lanes):
        rng = np.random.default_rng(lane)
        scale = np.float32 if lane % 3 == 2 else np.float16
        windows = [
            {
                "labels": rng.integers(0, 99, 7),
                "targets": {
                    "t": {
                        "index": rng.integers(0, 1 << 16, (7, 3)).astype(np.uint16),
                        "scale": rng.normal(size=(7, 5)).astype(scale),
                        "nothing": np.zeros((7, 0), np.uint8),
                    }
                },
            }
            for _ in range(2)
        ]
        rows = [rng.permutation(7)[:1], rng.permutation(7)[: share - 1]]
        shares.append(list(zip(windows, rows, strict=True)))
        pieces += [map_arrays(lambda array, rows=r: array[rows], w) for w, r in shares[-1]]
    return shares, map_arrays(lambda *arrays: np.concatenate(arrays), *pieces)


@pytest.mark.parametrize("workers", [0, 1, 2, 3, 7])
def test_shares_are_joined_in_the_order_of_their_lanes_also_where_their_types_differ(workers):
    shares, expected = made_up_shares(lanes=7, share=4)
    if workers:
        parts = [HandOver.of(shares[worker::workers]) for worker in range(workers)]
        assert all(part.buffer.is_shared() for part in parts)
        joined = dealt_back(parts, 7)
    else:
        joined = gathered(shares)

    def compare(tensor: torch.Tensor, array: np.ndarray) -> None:
        assert tensor.numpy().dtype == array.dtype
        assert np.array_equal(tensor.numpy(), array)

    map_arrays(compare, joined, expected)
    assert joined["targets"]["t"]["scale"].dtype == torch.float32


def test_a_window_is_freed_before_the_next_one_of_its_lane_is_read(world, monkeypatch):
    s = stream(world, batch_size=20, lanes=2, shuffle_blocks=1)
    windows: list[weakref.ref[np.ndarray]] = []
    alive: list[int] = []
    read = BlockReader.read

    def watched(self: BlockReader, *arguments: Any) -> Any:
        alive.append(sum(window() is not None for window in windows))
        arrays, targets = read(self, *arguments)
        windows.append(weakref.ref(arrays["images"]))
        return arrays, targets

    monkeypatch.setattr(BlockReader, "read", watched)
    steps = sum(batch.images.shape[0] == 20 for batch in s.epoch(0))
    assert steps == 15
    assert len(alive) >= 6
    assert max(alive) <= s.order.lanes - 1
