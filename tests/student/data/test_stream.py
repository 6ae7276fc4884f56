"""The stream: the same batches however it is read, every object compared, and nothing wrong read silently."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from storage.errors import DamageError, IdentityError, UserError
from storage.shards.index import cached_index, read_samples
from storage.shards.shard import open_shards
from storage.store.markers import Task
from storage.store.store import Store
from storage.testing import synthetic_shards
from storage.views.draw import draw_view
from storage.views.policy import policy
from storage.views.render import decode, render
from storage.views.view import View
from student.data.stream import Stream
from student.data.workers import leave_at_once
from student.evaluation.batches import evaluation_batches
from tests.typed import present

if TYPE_CHECKING:
    from student.data.batch import Batch


def stream(world, **changes) -> Stream:
    settings = {"batch_size": 32, "store": world.store, "targets": [world.targets["activations u8"]], "seed": 7}
    return Stream(world.shards, **{**settings, **changes})


def same(a: Batch, b: Batch) -> bool:
    arrays = [(getattr(a, n), getattr(b, n)) for n in ("images", "labels", "ids")]
    arrays += [(a.targets[t][n], b.targets[t][n]) for t in a.targets for n in a.targets[t]]
    return a.targets.keys() == b.targets.keys() and all(torch.equal(x, y) for x, y in arrays)


@pytest.fixture(scope="module")
def epochs(world) -> list[list[Batch]]:
    s = stream(world)
    return [list(s.epoch(e)) for e in range(3)]


def test_samples_come_with_their_own_image_label_and_target(world, epochs):
    store, target = Store.open(world.store), world.targets["activations u8"]
    indexes = [cached_index(url) for url in world.shards]
    samples = [read_samples(url, ix, range(len(ix))) for url, ix in zip(world.shards, indexes, strict=True)]
    bank = store.target(target).identity.bank
    for batch in epochs[0] + epochs[1]:
        for row, (shard, i, view) in enumerate(batch.ids.tolist()):
            marker = store.marker(Task("bank", bank, indexes[shard].id, view))
            replayed = View.of(marker.arrays["parameters"].read(i, i + 1)[0])
            sample = samples[shard][i]
            assert np.array_equal(batch.images[row], render(sample.image, replayed, 32))
            assert int(batch.labels[row]) == sample.label
            stored = store.marker(Task("target", target, indexes[shard].id, view)).arrays
            for name, values in batch.targets[target].items():
                assert np.array_equal(values[row], stored[name].read(i, i + 1)[0])


def test_every_view_is_used_and_each_block_in_one_view_an_epoch(epochs):
    seen: dict[tuple[int, int, int], int] = {}
    for epoch, batches in enumerate(epochs[:2]):
        for shard, i, view in torch.cat([b.ids for b in batches]).tolist():
            assert seen.setdefault((epoch, shard, i // 64), view) == view
    assert all(seen[0, s, b] != seen[1, s, b] for e, s, b in seen if e == 0 and (1, s, b) in seen)


@pytest.mark.parametrize("workers", [2, 3])
def test_the_same_batches_with_loader_workers(world, epochs, workers):
    s = stream(world, workers=workers)
    for epoch in (0, 1):
        there = list(s.epoch(epoch))
        assert len(there) == len(epochs[epoch])
        assert all(same(a, b) for a, b in zip(there, epochs[epoch], strict=True))
    assert all(same(a, b) for a, b in zip(s.epoch(2, start=4), epochs[2][4:], strict=True))


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_shares_of_ranks_joined_in_lane_order_are_the_batch(world, epochs, ranks):
    parts = [list(stream(world, rank=r, world_size=ranks).epoch(1)) for r in range(ranks)]
    share, lanes = 32 // 8, 8
    for g, whole in enumerate(epochs[1]):
        for lane in range(lanes):
            mine = slice((lane // ranks) * share, (lane // ranks + 1) * share)
            part = parts[lane % ranks][g]
            assert torch.equal(part.ids[mine], whole.ids[lane * share : (lane + 1) * share])
            assert torch.equal(part.images[mine], whole.images[lane * share : (lane + 1) * share])


@pytest.mark.parametrize("start", [1, 5, 9])
def test_started_at_a_batch_it_goes_on_as_undisturbed(world, epochs, start):
    assert all(same(a, b) for a, b in zip(stream(world).epoch(1, start), epochs[1][start:], strict=True))


def test_stopped_in_the_middle_the_next_epoch_is_whole(world, epochs):
    s = stream(world, workers=2)
    running: Any = s.epoch(0)
    next(running)
    running.close()
    assert all(same(a, b) for a, b in zip(s.epoch(1), epochs[1], strict=True))


def test_iterating_it_gives_epoch_after_epoch(world, epochs):
    s = stream(world)
    assert len(s) == len(epochs[0])
    for epoch in (0, 1):
        assert all(same(a, b) for a, b in zip(s, epochs[epoch], strict=True))


def test_more_workers_than_lanes_are_not_started_and_it_is_said(world):
    s = stream(world, workers=12)
    assert s.workers == 8
    assert s.notices == ["stream.workers=12: only 8 are started, one for each of stream.lanes"]


def test_fresh_views_are_those_of_the_epoch_s_number(world):
    light = policy("light", 32, seed=3)
    s = Stream(world.shards, batch_size=32, policy=light)
    for batch in s.epoch(5):
        for row, (shard, i, view) in enumerate(batch.ids.tolist()[:4]):
            index = cached_index(world.shards[shard])
            (sample,) = read_samples(world.shards[shard], index, range(i, i + 1))
            image = decode(sample.image)
            assert view == 5
            assert np.array_equal(batch.images[row], render(image, draw_view(light, sample.key, 5, image.size), 32))


def test_a_bank_without_targets_gives_its_views(world):
    bank = next(iter(Store.open(world.store).banks()))
    plain = Stream(world.shards, batch_size=32, store=world.store, bank=bank, seed=7)
    for a, b in zip(plain.epoch(0), stream(world).epoch(0), strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


def test_any_subset_of_shards_is_taken(world):
    for url in world.shards:
        one = Stream(url, batch_size=32, store=world.store, targets=[world.targets["logits"]])
        assert {int(shard) for batch in one for shard in batch.ids[:, 0]} == {0}


def test_several_targets_of_two_teachers_share_the_bank(world):
    names = ["activations f32", "class_row", "class_token", "q", "k", "logits"]
    s = stream(world, targets=[world.targets[n] for n in names])
    batch = next(s.epoch(0))
    shapes = [tuple(batch.target(world.targets[n]).shape[1:]) for n in names]
    assert shapes == [(60, 8, 8), (3, 3, 17), (48,), (1, 3, 17, 16), (1, 3, 17, 16), (3,)]
    scores = batch.target(world.targets["q"])[:, 0] @ batch.target(world.targets["k"])[:, 0].transpose(-2, -1) / 16**0.5
    rows = batch.target(world.targets["class_row"])[:, 2]
    assert torch.allclose(scores.softmax(-1)[:, :, 0], rows, atol=2e-3)


def test_memory_is_told_and_refused_beforehand(world):
    s = stream(world)
    maps = 8 * 64 + 12 * 64 + 16 * 16 + 24 * 4  # 8x8 and smaller
    assert s.memory == 8 * 4 * 64 * (3 * 32 * 32 + maps + 60 * 4)
    with pytest.raises(UserError, match=r"8 lanes × 4 blocks × 64 samples × 4.8 KiB.*stream.shuffle_blocks"):
        stream(world, memory=1 << 20)


def test_what_does_not_fit_is_refused(world, tmp_path):
    with pytest.raises(UserError, match="300 samples are fewer than one batch of 512"):
        stream(world, batch_size=512)
    with pytest.raises(IdentityError, match="views of each sample: the store has 2, asked for 3"):
        stream(world, views=3)
    with pytest.raises(UserError, match="no target is called 'nonsense'"):
        stream(world, targets=["nonsense"])
    others = synthetic_shards(tmp_path / "other", shards=1, samples=150, seed=9)
    with pytest.raises(IdentityError, match=r"image digest of key .*: expected \w+, found \w+\n.* 0 of its 150 images"):
        Stream(others, batch_size=32, store=world.store, targets=[world.targets["logits"]])
    unlabeled = synthetic_shards(tmp_path / "none", shards=1, samples=64, labels=False)
    with pytest.raises(UserError, match="key 'shard-000000-00000' has no label"):
        Stream(unlabeled, batch_size=32, policy=policy("light", 32))
    assert (
        int(next(Stream(unlabeled, batch_size=32, policy=policy("light", 32), labels=False).epoch(0)).labels[0]) == -1
    )


def test_a_pixel_changed_after_the_start_is_found_when_it_is_read(world, tmp_path):
    (copy,) = synthetic_shards(tmp_path / "data", shards=1, samples=150, classes=3)
    s = Stream(copy, batch_size=32, store=world.store, targets=[world.targets["logits"]])
    path = tmp_path / "data" / "shard-000000.tar"
    index = cached_index(copy)
    data = bytearray(path.read_bytes())
    data[(index.starts[70] + index.starts[71]) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises((IdentityError, UserError), match="shard-000000-00070"):
        list(s.epoch(0))


def test_a_mismatch_of_signatures_names_both_sides_decoders(world, monkeypatch):
    monkeypatch.setattr("storage.store.banks.render", lambda *args: render(*args) ^ 1)
    monkeypatch.setattr("storage.store.banks.renderer", lambda: {"pillow": "1.2.3"})
    with pytest.raises(IdentityError, match=r"signature of the view's pixels: expected \w{8}, found \w{8}\n.*1\.2\.3"):
        next(stream(world).epoch(0))


def test_an_error_in_a_worker_arrives_as_itself_and_the_workers_leave_when_told(world, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 60.0)  # until a worker is terminated
    store, others = world.copy(tmp_path / "store"), multiprocessing.active_children()
    s = Stream(world.shards, batch_size=32, store=store, targets=[world.targets["logits"]], workers=2)
    chunk = next((store / "targets" / world.targets["logits"]).rglob("c/0/0"))
    chunk.unlink()
    with pytest.raises(DamageError, match="missing: a chunk that was written is gone"):
        [batch for epoch in range(2) for batch in s.epoch(epoch)]
    started = [process for process in multiprocessing.active_children() if process not in others]
    assert len(started) == 2
    del s
    gc.collect()
    assert {process.exitcode for process in started} == {0}, "workers were not told to stop and were terminated"


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (signal.SIGKILL, r"was killed by SIGKILL: .*memory ran out .*\d GiB may be taken here.*MiB ahead; start fewer"),
        (signal.SIGBUS, r"was ended by SIGBUS: .*/dev/shm is full"),
    ],
)
def test_a_worker_that_dies_is_named_with_its_signal_wherever_it_is_noticed(world, number, told):
    s = stream(world, workers=2)
    before = set(multiprocessing.active_children())
    batches = s.epoch(0)
    next(batches)
    _, second = sorted(set(multiprocessing.active_children()) - before, key=lambda process: present(process.pid))

    def killed() -> None:
        with s.watched():
            os.kill(present(second.pid), number)
            second.join()
            for _ in range(1_000_000):  # PyTorch raises here, or where the next batch is asked for
                pass
            list(batches)

    with pytest.raises(UserError, match=rf"^loader worker 2 of 2 \(process {second.pid}\) {told}"):
        killed()
    with pytest.raises(UserError, match="loader worker 2 of 2"):
        list(s.epoch(1))


def test_evaluation_counts_every_sample_once(world):
    for batch_size in (7, 64, 1000):
        ids = torch.cat([b.ids for b in evaluation_batches(open_shards(world.shards), policy("eval", 32), batch_size)])
        assert ids[:, :2].tolist() == [[s, i] for s in range(2) for i in range(150)]


def test_an_iterator_that_another_epoch_overtook_says_so(world):
    s = stream(world)
    first = s.epoch(0)
    next(first)
    next(s.epoch(1))
    with pytest.raises(UserError, match=r"epoch 0 .*cannot go on"):
        next(first)


def test_fewer_views_can_be_asked_for_where_later_ones_are_missing(world, tmp_path):
    store = world.copy(tmp_path / "store")
    target = world.targets["logits"]
    min((store / "done").glob(f"target.{target}.*.1.json")).unlink()
    with pytest.raises(DamageError, match=r"over all shards, or use fewer views: `stream\.views=N`"):
        stream(world, store=store, targets=[target])
    assert {int(v) for b in stream(world, store=store, targets=[target], views=1).epoch(0) for v in b.ids[:, 2]} == {0}


def test_the_same_samples_under_two_paths_are_refused(world, tmp_path):
    import shutil

    copy = shutil.copy(world.shards[0], tmp_path / "other-name.tar")
    with pytest.raises(UserError, match="holds the same samples"):
        Stream(
            [world.shards[0], copy, world.shards[0].replace("/data/", "/data/../data/")],
            batch_size=32,
            policy=policy("light", 32),
        )


def test_ranks_share_the_memory_of_their_machine(world, monkeypatch):
    machine = 2 * stream(world).memory
    monkeypatch.setattr("distributed.system.MEMORY_LIMIT", machine)
    stream(world)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="what is read ahead in each process would take"):
        stream(world)


def test_a_worker_that_is_told_to_stop_while_it_hands_over_does_not_abort(world, monkeypatch):
    script = """
import threading, time, torch
from student.data.workers import leave_at_once

def hand_over():
    while True:
        torch.zeros(100_000).share_memory_()

leave_at_once(0)
for _ in range(4):
    threading.Thread(target=hand_over, daemon=True).start()
time.sleep(0.2)
"""
    told: dict[str, Any] = {}

    class Told(DataLoader[Any]):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            told.update(settings)
            super().__init__(*arguments, **settings)

    monkeypatch.setattr("student.data.stream.DataLoader", Told)
    stream(world, workers=1)
    assert told["worker_init_fn"] is leave_at_once
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


class _Wrapped(IterableDataset[torch.Tensor]):
    """Labels of a stream, for somebody else's DataLoader."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __iter__(self):
        return (batch.labels for batch in self.stream.epoch(0))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_stream_in_a_dataloader_with_workers_says_that_it_loads_by_itself(world, wrapped):
    stream = Stream(world.shards, batch_size=20, lanes=4, shuffle_blocks=1, policy=policy("light", 16))
    loader = DataLoader(_Wrapped(stream) if wrapped else stream, batch_size=None, num_workers=2)
    with pytest.raises(UserError, match="a Stream loads by itself") as error:
        next(iter(loader))
    assert "workers=N" in str(error.value)
