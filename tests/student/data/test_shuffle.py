"""Contract 9: the order depends on (shards, seed, epoch, lanes, shuffle_blocks, batch) alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import UserError
from student.data.shuffle import BlockShuffle, default_lanes, lanes_of


def blocks_of(*shards: int, bad: dict[int, set[int]] | None = None) -> list[tuple[int, int, np.ndarray]]:
    found = []
    for shard, samples in enumerate(shards):
        good = [i for i in range(samples) if i not in (bad or {}).get(shard, set())]
        for block in range(-(-samples // 64)):
            inside = np.array([i for i in good if i // 64 == block])
            if len(inside):
                found.append((shard, block, inside))
    return found


def lane_samples(order: BlockShuffle, epoch: int, lane: int, start: int = 0) -> list[tuple[int, int]]:
    taken = []
    for segments, rows in order.lane(epoch, lane, start):
        joined = [(s.shard, int(i)) for s in segments for i in s.samples]
        taken += [joined[row] for row in rows]
    return taken


def epoch_batches(order: BlockShuffle, epoch: int, start: int = 0) -> list[list[tuple[int, int]]]:
    lanes = [lane_samples(order, epoch, lane, start) for lane in range(order.lanes)]
    steps, share = order.steps - start, order.share
    assert all(len(lane) == steps * share for lane in lanes)
    return [[s for lane in lanes for s in lane[g * share : (g + 1) * share]] for g in range(steps)]


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=5),
    batch=st.sampled_from([8, 16, 32, 48]),
    shuffle_blocks=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_every_sample_comes_at_most_once_and_less_than_a_batch_is_left_out(sizes, batch, shuffle_blocks, seed):
    if sum(sizes) < batch:
        with pytest.raises(UserError, match="fewer than one batch"):
            BlockShuffle(blocks_of(*sizes), batch, seed, shuffle_blocks=shuffle_blocks)
        return
    order = BlockShuffle(blocks_of(*sizes), batch, seed, shuffle_blocks=shuffle_blocks)
    taken = [s for b in epoch_batches(order, 3) for s in b]
    assert len(set(taken)) == len(taken) == sum(sizes) // batch * batch
    assert set(taken) <= {(shard, i) for shard, n in enumerate(sizes) for i in range(n)}


def test_starting_at_a_batch_goes_on_where_the_epoch_would_be():
    order = BlockShuffle(blocks_of(300, 170, 90), 32, seed=5)
    whole = epoch_batches(order, 2)
    for start in (0, 1, 7, order.steps - 1, order.steps):
        assert epoch_batches(order, 2, start) == whole[start:]


def test_epochs_and_seeds_differ_and_other_samples_are_left_out():
    order = BlockShuffle(blocks_of(300, 170), 64, seed=0)
    first, second = epoch_batches(order, 0), epoch_batches(order, 1)
    assert first != second
    assert {s for b in first for s in b} != {s for b in second for s in b}
    assert epoch_batches(BlockShuffle(blocks_of(300, 170), 64, seed=1), 0) != first
    assert epoch_batches(BlockShuffle(blocks_of(300, 170), 64, seed=0), 0) == first


def test_invalid_samples_are_left_out_first():
    order = BlockShuffle(blocks_of(200, bad={0: {3, 64, 199}}), 8)
    assert order.samples == 197
    for epoch in range(5):
        assert not {(0, 3), (0, 64), (0, 199)} & {s for b in epoch_batches(order, epoch) for s in b}


@pytest.mark.parametrize(
    ("batch", "lanes"), [(64, 8), (128, 16), (256, 32), (1024, 128), (4096, 128), (96, 8), (8, 8), (6, 6), (1, 1)]
)
def test_lanes_by_default(batch, lanes):
    assert default_lanes(batch) == lanes


def test_lanes_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="cannot be cut into the 8 equal parts"):
        BlockShuffle(blocks_of(200), 20)
    assert BlockShuffle(blocks_of(200), 20, lanes=5).share == 4
    with pytest.raises(UserError, match="3 ranks do not divide 8 lanes"):
        lanes_of(8, 0, 3)


def test_ranks_and_workers_deal_out_all_lanes_once():
    for ranks in (1, 2, 4):
        for workers in (1, 2, 3):
            dealt = [lane for r in range(ranks) for w in range(workers) for lane in lanes_of(16, r, ranks, w, workers)]
            assert sorted(dealt) == list(range(16))


def test_a_large_epoch_reads_blocks_hardly_more_than_once_and_mixes_them():
    order = BlockShuffle(blocks_of(*[5000] * 8), 512, seed=1)
    read = [(s.shard, s.block) for lane in range(order.lanes) for segments, _ in order.lane(0, lane) for s in segments]
    assert 1.0 <= len(read) / len(order.blocks) <= 1.3
    for batch in epoch_batches(order, 0)[::10]:
        blocks = [(shard, i // 64) for shard, i in batch]
        assert max(blocks.count(b) for b in set(blocks)) / len(batch) <= 0.04


def test_views_go_round_in_a_new_permutation_each_time():
    order = BlockShuffle(blocks_of(640), 64)
    for block in range(10):
        rounds = [[order.view(epoch, 0, block, 4) for epoch in range(r * 4, r * 4 + 4)] for r in range(6)]
        assert all(sorted(views) == [0, 1, 2, 3] for views in rounds)
    assert len({tuple(order.view(e, 0, b, 4) for e in range(8)) for b in range(10)}) > 1
    assert all(order.view(epoch, 0, 0, 1) == 0 for epoch in range(3))
