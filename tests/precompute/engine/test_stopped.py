"""Runs that stop half way, two at once, damaged markers: the same command makes the store of one run."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from storage.errors import UserError
from storage.store.store import Store
from storage.views.render import render
from tests.conftest import HANGS, ROOT, World, run_precompute, teacher_of
from tests.precompute.stores import (
    CNN,
    F32,
    VIT,
    assert_same,
    attempts,
    contents,
    counted,
    failures,
    of_cnn,
    seeded,
    small_shard,
    snapshot,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def fail_after(blocks: int) -> Callable[[list[np.ndarray]], None]:
    left = iter(range(blocks))

    def act(outputs: list[np.ndarray]) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    return act


def bank_marker(folder: Path, shard: str | None = None, view: int = 0) -> Path:
    tasks = [task for task in Store.open(folder).done() if task.kind == "bank" and task.view == view]
    return folder / "done" / min(task for task in tasks if shard in (None, task.shard)).name


# ---------------------------------------------------------------------------------------------- stopped half way


@pytest.mark.parametrize("blocks", [0, 1, 4, 7, 11])
def test_contract_3_a_run_that_stops_leaves_whole_shards_and_goes_on_to_the_same_store(
    world: World, tmp_path: Path, watch: Any, blocks: int
) -> None:
    place = seeded(world, tmp_path / "store")
    watch(fail_after(blocks))
    with pytest.raises(KeyboardInterrupt):
        run_precompute(place, world.shards, teacher_of(world.weights, "cnn"), CNN)
    done = Store.open(place).done()
    assert len({task.shard for task in done}) == blocks // 6, "3 blocks of 2 views make a shard"
    assert len(done) == blocks // 6 * 2 * (len(CNN) + 1)
    assert attempts(place) == counted(place)
    watch(lambda outputs: None)
    result = run_precompute(place, world.shards, teacher_of(world.weights, "cnn"), CNN)
    assert result["written"] == 2 * len(CNN) * (2 - blocks // 6)
    assert_same(contents(place), of_cnn(contents(world.store)))
    assert not failures(place, world.shards)


CHILD = """
import os, signal, sys
from precompute.engine.session import open_session
from precompute.engine.shard import run_task
from precompute.engine.tasks import ShardTask, TargetOutput
from storage.store.banks import bank_policy
from storage.store.store import Store

place, target, kill_after, *shards = sys.argv[1:]
store = Store.open(place)
manifest = store.target(target)
session = open_session(store.graph(manifest.teacher, manifest.graph), "cpu", 1)
real, left = session.run, int(kill_after)

def run(images):
    global left
    left -= 1
    if left == -1:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(images)

session.run = run
outputs, policy = (TargetOutput.of(manifest),), bank_policy(store, manifest.identity.bank)
for url in shards:
    of_it = {"policy": policy, "teacher": manifest.teacher, "graph": manifest.graph, "outputs": outputs}
    run_task(ShardTask(store=store, url=url, views=2, **of_it), lambda: session, 1)
assert "torch" not in sys.modules, "a worker that only runs a graph needs no torch"
"""


def child(place: Path, target: str, kill_after: int, shards: list[str]) -> subprocess.Popen[bytes]:
    """A process of its own that makes a target of shards; it kills itself after so many blocks."""
    command = [sys.executable, "-c", CHILD, str(place), target, str(kill_after), *shards]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)


def test_contract_3_and_6_after_sigkill_two_processes_at_once_complete_the_store(world: World, tmp_path: Path) -> None:
    place, target = seeded(world, tmp_path / "store"), world.targets["activations f32"]
    killed = child(place, target, 8, world.shards)
    killed.communicate(timeout=HANGS)
    assert killed.returncode == -signal.SIGKILL
    done = Store.open(place).done()
    assert {(task.kind, task.view) for task in done} == {("bank", 0), ("bank", 1), ("target", 0), ("target", 1)}
    assert len({task.shard for task in done}) == 1
    assert attempts(place) > counted(place), "nobody could remove what the killed run had begun"
    both = [child(place, target, -1, world.shards), child(place, target, -1, world.shards[::-1])]
    for process in both:
        _, err = process.communicate(timeout=HANGS)
        assert process.returncode == 0, err.decode()
    mine, theirs = contents(place), contents(world.store)
    assert_same(mine, {t: a for t, a in theirs.items() if t.kind == "bank" or t.id == target})
    assert not failures(place, world.shards)


def test_contract_6_two_runs_at_once_make_one_store(world: World, tmp_path: Path, watch: Any) -> None:
    place = seeded(world, tmp_path / "store")
    meet = threading.Barrier(2, timeout=HANGS)
    watch(lambda outputs: meet.wait())  # both render and run every block at the same time, and mark at the same time
    raised: list[BaseException] = []
    written: list[int] = []

    def one() -> None:
        try:
            written.append(run_precompute(place, world.shards, teacher_of(world.weights, "cnn"), CNN)["written"])
        except BaseException as error:
            meet.abort()
            raised.append(error)

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not raised
    assert written == [12, 12], "both did all the work, or this proves nothing"
    assert attempts(place) == counted(place), "who comes second takes away what it wrote"
    assert_same(contents(place), of_cnn(contents(world.store)))
    assert not failures(place, world.shards)


def test_contract_6_of_two_runs_that_drew_other_views_the_second_is_refused(
    world: World, tmp_path: Path, watch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = seeded(world, tmp_path / "store")
    shard = small_shard(tmp_path / "data")

    def meanwhile(outputs: list[np.ndarray]) -> None:
        watch(lambda outputs: None)
        with monkeypatch.context() as other:
            other.setattr(
                "precompute.engine.stages.render", lambda image, view, side: np.full((side, side, 3), 7, np.uint8)
            )
            run_precompute(place, shard, teacher_of(world.weights, "cnn"), F32)

    watch(meanwhile)
    with pytest.raises(UserError, match="checksums of the bank's parameters and signatures"):
        run_precompute(place, shard, teacher_of(world.weights, "cnn"), F32)
    assert attempts(place) == counted(place)
    assert not failures(place, [])


# ---------------------------------------------------------------------------------------------- damaged markers


def remove(path: Path) -> None:
    path.unlink()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def another(path: Path) -> None:
    shutil.copy(next(other for other in path.parent.iterdir() if other.name < path.name), path)


@pytest.mark.parametrize("damage", [remove, flip, cut, another])
def test_contract_4_a_target_without_its_marker_is_made_again_alone(
    world: World, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    place = world.copy(tmp_path / "store")
    task = max(t for t in Store.open(place).done() if t.id == world.targets["activations u8"])
    before = snapshot(place)
    damage(place / "done" / task.name)
    result = run_precompute(place, world.shards, teacher_of(world.weights, "cnn"), CNN)
    assert (result["written"], result["view_images"]) == (1, 150)
    after = snapshot(place)
    changed = {name for name in before if after.get(name) != before[name]}
    assert changed == {f"done/{task.name}"}
    assert_same(contents(place), contents(world.store))
    assert not failures(place, [])


@pytest.mark.parametrize("damage", [remove, flip, cut, another])
def test_a_bank_without_its_marker_is_made_again_and_targets_of_the_same_views_stay_good(
    world: World, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    place = world.copy(tmp_path / "store")
    damage(bank_marker(place, view=1))
    assert failures(place, [])
    result = run_precompute(place, world.shards, teacher_of(world.weights, "cnn"), CNN)
    assert (result["written"], result["view_images"]) == (len(CNN), 150), "this shard and view alone"
    assert not failures(place, world.shards), "the other teacher saw the same views"
    result = run_precompute(place, world.shards, teacher_of(world.weights, "vit"), VIT)
    assert (result["written"], result["view_images"]) == (0, 0)
    assert_same(contents(place), contents(world.store))


def test_targets_of_other_views_than_the_bank_has_are_named_and_made_again(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, shards = world.copy(tmp_path / "store"), world.shards[:1]
    for view in (0, 1):
        bank_marker(place, view=view).unlink()
    with monkeypatch.context() as other:
        for module in ("precompute.engine.stages", "storage.store.banks"):
            other.setattr(f"{module}.render", lambda image, view, size: 255 - render(image, view, size))
        result = run_precompute(place, shards, teacher_of(world.weights, "cnn"), CNN)
        assert result["written"] == 2 * len(CNN)
        named = failures(place, [])
        assert len(named) == 2 * 4, "every view of the other teacher's targets over this shard"
        assert all("vit-" in line and "were made from another bank" in line for line in named)
        result = run_precompute(place, shards, teacher_of(world.weights, "vit"), VIT)
        assert result["written"] == 2 * 4
        assert not failures(place, shards)
    mine, theirs = contents(place), contents(world.store)
    changed = {task for task in mine if any(not np.array_equal(mine[task][n], theirs[task][n]) for n in mine[task])}
    assert changed == {task for task in mine if task.shard == min(t.shard for t in mine)}


def test_contract_5_views_that_are_added_are_rendered_as_those_that_are_there(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = world.copy(tmp_path / "store")
    before = snapshot(place)
    for module in ("precompute.engine.stages", "storage.store.banks"):
        monkeypatch.setattr(f"{module}.render", lambda image, view, size: render(image, view, size) ^ 1)
    with pytest.raises(UserError, match="signature of the view's pixels"):
        run_precompute(place, world.shards, teacher_of(world.weights, "cnn"), CNN, num_views=3)
    assert snapshot(place) == before


def test_views_of_the_bank_that_are_damaged_stop_a_run_and_are_named(world: World, tmp_path: Path) -> None:
    place = seeded(world, tmp_path / "store")
    shard = small_shard(tmp_path / "data")
    run_precompute(place, shard, teacher_of(world.weights, "cnn"), F32)
    chunk = next(place.glob("banks/*/*/0/*/parameters/c/0/0"))
    flip(chunk)
    with pytest.raises(UserError, match=str(chunk.relative_to(place))):
        run_precompute(place, shard, teacher_of(world.weights, "vit"), VIT)
