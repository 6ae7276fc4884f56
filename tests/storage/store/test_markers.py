"""Tasks and markers: what was committed counts, once, and a commit that fails leaves no hole."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import DamageError
from storage.objects import json_record
from storage.store.markers import Task
from storage.store.store import Store
from storage.testing import FaultyObjectStore
from tests.storage.helpers import MADE, decoded, files_of

names = st.text("abcXYZ019_-", min_size=1, max_size=12)


@given(st.sampled_from(["bank", "target"]), names, names, st.integers(0, 10**6))
@settings(max_examples=60)
def test_a_task_is_read_back_from_its_name(kind, id, shard, view):
    task = Task(kind, id, shard, view)
    assert Task.named(task.name) == task


@pytest.mark.parametrize(
    "name",
    [
        "",
        "x.json",
        "target.a.b.json",
        "target.a.b.1.json.part",
        "teacher.a.b.1.json",
        "target.a.b.c.1.json",
        "target.a.b.-1.json",
        ".DS_Store",
        "target.a.b.1.jsonx",
    ],
)
def test_other_names_are_no_tasks(name):
    assert Task.named(name) is None


def test_done_is_what_was_committed(kept):
    small, values = kept
    banks = {Task("bank", small.policy.bank, i.id, v) for i in small.indexes for v in range(2)}
    assert small.store.done() == banks | {task for tasks in values.values() for task in tasks}


def test_an_attempt_counts_from_its_commit_on(small):
    task = Task("target", "t", small.indexes[0].id, 2)
    values = np.ones((10, 3, 4, 4), np.float32)
    attempt = small.attempt(task, "u8", values)
    assert task not in small.store.done()
    with pytest.raises(DamageError, match=re.escape(task.name)):
        small.store.marker(task)
    assert attempt.commit(MADE).record.attempt == attempt.name
    assert task in small.store.done()
    assert np.array_equal(decoded(small.store, task, "u8"), values)


def test_of_two_attempts_at_one_task_the_first_counts(small):
    task = Task("target", "t", small.indexes[0].id, 2)
    ones = np.ones((10, 3, 4, 4), np.float32)
    first, second = small.attempt(task, "f32", ones), small.attempt(task, "f32", ones * 2)
    marker = first.commit(MADE)
    before = files_of(small.store.objects.root)
    assert second.commit(MADE).record == marker.record
    assert small.store.objects.names(task.folder) == [first.name]
    assert {k: v for k, v in files_of(small.store.objects.root).items() if second.name not in k} == {
        k: v for k, v in before.items() if second.name not in k
    }
    assert np.array_equal(decoded(small.store, task, "f32"), ones)


def test_of_two_threads_that_commit_one_task_one_counts(small):
    for view in range(2, 6):
        task = Task("target", "t", small.indexes[0].id, view)
        values = [np.full((10, 3, 4, 4), number, np.float32) for number in range(2)]
        barrier = threading.Barrier(2)

        def work(number: int, task=task, values=values, barrier=barrier) -> str:
            attempt = small.attempt(task, "f32", values[number])
            barrier.wait()
            return str(attempt.commit(MADE).record.attempt)

        with ThreadPoolExecutor(2) as threads:
            counts = list(threads.map(work, range(2)))
        assert counts[0] == counts[1]
        assert small.store.objects.names(task.folder) == [counts[0]]
        found = decoded(small.store, task, "f32")
        assert any(np.array_equal(found, each) for each in values)


def test_abandoning_removes_only_what_does_not_count(small):
    task = Task("target", "t", small.indexes[0].id, 2)
    ones = np.ones((10, 3, 4, 4), np.float32)
    first, second = small.attempt(task, "f32", ones), small.attempt(task, "f32", ones)
    second.abandon()
    assert small.store.objects.names(task.folder) == [first.name]
    first.commit(MADE)
    first.abandon()  # a failure of something else, later
    assert np.array_equal(decoded(small.store, task, "f32"), ones)


@pytest.mark.parametrize(
    ("operation", "fault"), [("link", "lost"), ("sync", "EIO"), ("write", "ENOSPC"), ("link", "EIO")]
)
def test_a_commit_that_fails_and_is_abandoned_leaves_no_hole(small, operation, fault):
    task = Task("target", "t", small.indexes[0].id, 2)
    ones = np.ones((10, 3, 4, 4), np.float32)
    failing = 0
    for number in range(12):  # each of the steps of a commit
        place = FaultyObjectStore(small.store.url, operation, -1, fault)
        small.store = Store(place)
        attempt = small.attempt(task, "f32", ones)
        place.fail_at = place.calls + number
        try:
            attempt.commit(MADE)
        except OSError:
            failing += 1
            attempt.abandon()
        plain = Store.open(small.store.url)
        if task in plain.done():
            assert np.array_equal(decoded(plain, task, "f32"), ones)
            plain.objects.remove(f"done/{task.name}")
        plain.objects.remove(task.folder)
    assert failing >= 1


def test_a_marker_under_another_tasks_name_is_damage(small):
    first, view, shard, _ = sorted(small.values)
    others = [view, shard, Task("target", "other", first.shard, 0), Task("bank", "t", first.shard, 0)]
    for other in others:
        small.store.objects.put(f"done/{other.name}", small.store.objects.get(f"done/{first.name}"))
        with pytest.raises(DamageError, match=rf"{re.escape(other.name)}: damaged: it is the marker of target\.t\."):
            small.store.marker(other)


def test_a_writer_takes_a_damaged_marker_for_none(small):
    task = min(small.values)
    samples = small.store.marker(task).samples
    assert small.store.find(task, samples).task == task
    good = small.store.objects.get(f"done/{task.name}")
    small.store.objects.put(f"done/{task.name}", good.replace(b'"view":0', b'"view":1'))
    assert small.store.find(task, samples) is None
    assert task not in small.store.done()
    assert small.store.find(task, samples) is None


def test_a_marker_that_somebody_put_in_place_of_a_judged_one_stays(small):
    task = min(small.values)
    judged = small.store.marker(task)
    good = small.store.objects.get(f"done/{task.name}")
    small.store.objects.put(f"done/{task.name}", json_record.to_json({**judged.record.plain(), "by": "another run"}))
    small.store.discard(judged)
    assert small.store.marker(task).record.plain()["by"] == "another run"
    small.store.objects.put(f"done/{task.name}", good)
    small.store.discard(judged)
    assert task not in small.store.done()


def test_how_many_views_a_target_has(small):
    store, shards = small.store, [index.id for index in small.indexes]
    assert store.views("target", "t", shards, store.done()) == 2
    third = Task("target", "t", shards[0], 2)
    small.attempt(third, "u8", np.ones((10, 3, 4, 4), np.float32)).commit(MADE)
    assert store.views("target", "t", shards[:1], store.done()) == 3
    with pytest.raises(DamageError, match=re.escape(third.name.replace(shards[0], shards[1]))):
        store.views("target", "t", shards, store.done())
    assert store.views("target", "t", shards, store.done(), most=2) == 2
    assert store.views("target", "t", shards[1:], store.done()) == 2
    assert store.views("target", "nothing", shards, store.done()) == 0


@pytest.mark.parametrize("view", [0, 1])
def test_a_gap_in_the_views_names_the_marker(small, view):
    task = sorted(small.values)[view]
    small.store.objects.remove(f"done/{task.name}")
    with pytest.raises(DamageError, match=rf"done/{re.escape(task.name)}: missing"):
        small.store.views("target", "t", [index.id for index in small.indexes], small.store.done())
