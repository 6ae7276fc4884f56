"""The stream as a loader that trainers save and restore: a state, loaded anywhere, gives the batches that are left."""

from __future__ import annotations

import json

import pytest
import torch

from storage.errors import IdentityError, UserError
from storage.views.policy import policy
from student.data.stream import Stream
from tests.student.data.test_stream import same, stream

STEPS = 9  # of an epoch of the world's 300 samples in batches of 32


def all_same(ours, theirs) -> bool:
    return all(same(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def epochs(world):
    undisturbed = stream(world)
    return [list(undisturbed) for _ in range(3)]


def states_of(interrupted: Stream) -> list[dict[str, object]]:
    """The state before two epochs and after each of their batches."""
    return [interrupted.state_dict(), *(interrupted.state_dict() for _ in range(2) for _ in interrupted)]


@pytest.mark.parametrize(("before", "after"), [(0, 0), (0, 2), (3, 1)])
def test_interrupted_at_any_batch_a_new_stream_gives_the_batches_that_are_left(world, epochs, before, after):
    states = states_of(stream(world))
    assert len(states) == 2 * STEPS + 1
    if before:
        assert states_of(stream(world, workers=before)) == states
    whole = [batch for batches in epochs for batch in batches]
    # Workers, which take seconds to start, begin in the middle of an epoch, at its start, and in the middle of a later.
    some = range(len(states)) if after == 0 else (4, STEPS, STEPS + 7)
    again = stream(world, workers=after)
    for seen in some:
        again.load_state_dict(json.loads(json.dumps(states[seen])))
        assert all_same(again, whole[seen : STEPS * (seen // STEPS + 1)])


def test_the_epoch_after_the_one_that_was_resumed_is_whole(world, epochs):
    left = stream(world)
    next(iter(left))
    again = stream(world)
    again.load_state_dict(left.state_dict())
    assert all_same(again, epochs[0][1:])
    assert all_same(again, epochs[1])


def test_set_epoch_gives_what_the_order_says(world):
    s = stream(world)
    for epoch in (4, 1, 1):
        s.set_epoch(epoch)
        lanes = [s.order.lane(epoch, lane) for lane in range(s.order.lanes)]
        expected = []
        for windows in lanes:
            rows = []
            for segments, order in windows:
                views = [s.order.view(epoch, part.shard, part.block, 2) for part in segments]
                joined = [(p.shard, int(i), v) for p, v in zip(segments, views, strict=True) for i in p.samples]
                rows += [joined[n] for n in order]
            expected.append(rows)
        for step, batch in enumerate(s):
            share = slice(step * s.order.share, (step + 1) * s.order.share)
            assert [tuple(row) for row in batch.ids.tolist()] == [row for rows in expected for row in rows[share]]
        assert step == STEPS - 1


def test_set_epoch_keeps_the_place_of_a_state_of_this_epoch_alone(world, epochs):
    s = stream(world)
    place = {**s.state_dict(), "epoch": 1, "step": 6}
    s.load_state_dict(place)
    s.set_epoch(1)  # what a loop over the epochs says that begins with the resumed one
    assert s.state_dict() == place
    assert all_same(s, epochs[1][6:])
    s.load_state_dict(place)
    s.set_epoch(0)
    assert all_same(s, epochs[0])
    for _ in s:
        break
    s.set_epoch(1)
    assert all_same(s, epochs[1]), "an epoch that was left in the middle begins again"


def test_ranks_go_on_from_the_state_of_one_rank(world, epochs):
    ranks = [stream(world, rank=rank, world_size=2) for rank in range(2)]
    for one in ranks:
        one.load_state_dict({**stream(world).state_dict(), "step": 5})
    for whole, *parts in zip(epochs[0][5:], *ranks, strict=True):
        by_lane = [part.ids.view(4, -1, 3) for part in parts]
        assert torch.equal(torch.stack(by_lane, 1).view(-1, 3), whole.ids)
    assert ranks[0].state_dict() == ranks[1].state_dict()


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("seed", {"seed": 8}),
        ("batch_size", {"batch_size": 16, "lanes": 8}),
        ("lanes", {"lanes": 16}),
        ("shuffle_blocks", {"shuffle_blocks": 2}),
        ("views", {"views": 1}),
    ],
)
def test_a_state_of_another_order_is_refused_by_name(world, field, changes):
    with pytest.raises(IdentityError) as refused:
        stream(world, **changes).load_state_dict(stream(world).state_dict())
    assert refused.value.field == field


def test_a_state_of_other_shards_or_views_is_refused_by_name(world):
    state = Stream(world.shards, batch_size=32, policy=policy("light", 32)).state_dict()
    with pytest.raises(IdentityError, match="shards"):
        Stream(world.shards[:1], batch_size=32, policy=policy("light", 32)).load_state_dict(state)
    with pytest.raises(IdentityError, match=r"bank: it has light-32-\w+, this stream has light-32-\w+"):
        Stream(world.shards, batch_size=32, policy=policy("light", 32, seed=1)).load_state_dict(state)


@pytest.mark.parametrize(
    "place", [{"step": -1}, {"step": STEPS}, {"epoch": -1}, {"epoch": "0"}, {"step": 0.5}, {"step": True}]
)
def test_a_state_that_is_none_is_refused_and_changes_nothing(world, epochs, place):
    s = stream(world)
    with pytest.raises(UserError, match="an epoch has 9 steps"):
        s.load_state_dict({**s.state_dict(), **place})
    with pytest.raises(UserError, match="a stream's state has no 'shards'"):
        s.load_state_dict({"epoch": 1, "step": 0})
    assert same(next(iter(s)), epochs[0][0])


@pytest.mark.parametrize("workers", [0, 1])
def test_iterating_leaves_torch_s_generator_alone(world, workers):
    s = stream(world, workers=workers)
    before = torch.get_rng_state()
    next(iter(s))
    assert torch.equal(torch.get_rng_state(), before)


def test_torchdata_s_loader_saves_and_restores_it(world, epochs):
    stateful = pytest.importorskip("torchdata.stateful_dataloader")
    loader = stateful.StatefulDataLoader(stream(world), batch_size=None)
    batches = iter(loader)
    assert all_same([next(batches) for _ in range(4)], epochs[0][:4])
    again = stateful.StatefulDataLoader(stream(world), batch_size=None)
    again.load_state_dict(loader.state_dict())
    assert all_same(again, epochs[0][4:])
    assert all_same(again, epochs[1])
