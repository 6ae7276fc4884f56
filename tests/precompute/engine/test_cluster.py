"""Many shards at once: the same store on any workers, shards and workers that fail, and two thousand shards."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from distributed import Client

from pipeline.cli import main
from precompute.engine import dask_runner
from precompute.engine.dask_client import local_cluster
from precompute.engine.tasks import Failure, Outcome, ShardTask
from storage.errors import UserError
from storage.progress import NoProgress as Silent
from storage.shards.shard import open_shard
from storage.store.store import Store
from storage.testing import synthetic_image
from storage.views.policy import policy
from tests.conftest import HANGS, World
from tests.precompute.bare import Bare, bare, encoded, tar
from tests.precompute.engine.clusters import (
    SAMPLES,
    SLOW,
    address_of,
    begun,
    command,
    copies,
    end,
    hooked,
    markers,
    processes_of,
    run,
    start,
    until,
    words,
)
from tests.precompute.stores import assert_same, attempts, contents, counted, failures, rewritten, seeded

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def machines() -> Iterator[Any]:
    """Two workers that many runs join."""
    with local_cluster(2) as place:
        yield place


@pytest.fixture
def client(machines: Any) -> Iterator[Client]:
    with Client(machines.scheduler_address, set_as_default=False) as connected:
        connected.wait_for_workers(2, timeout=HANGS)
        yield connected


# ---------------------------------------------------------------------------------------------- one store


@pytest.mark.parametrize("count", [1, 2])
def test_contract_1_any_number_of_workers_makes_the_store_of_one_process_bit_for_bit(
    deit: World, expected: Any, tmp_path: Path, count: int
) -> None:
    place = seeded(deit, tmp_path / "store")
    result, lines = run(deit, place, workers=count)
    assert not result["failures"]
    assert (result["written"], result["view_images"]) == (3 * 2 * 2, 3 * 2 * SAMPLES)
    assert any(line.startswith(f"{count} worker(s)") for line in lines)
    assert result["session"]["provider"] == "cpu"
    assert_same(contents(place), expected)
    assert attempts(place) == counted(place)
    assert not failures(place, deit.shards)


def test_workers_are_free_of_torch(deit: World, expected: Any, tmp_path: Path, client: Client) -> None:
    place = seeded(deit, tmp_path / "store")
    result, _ = run(deit, place, dask=address_of(client))
    assert result["written"] == 12
    assert_same(contents(place), expected)

    def heavy() -> list[str]:
        import sys

        assert "precompute.engine.shard" in sys.modules
        return [name for name in ("torch", "timm", "webdataset", "torchvision") if name in sys.modules]

    assert list(client.run(heavy).values()) == [[], []]


# ---------------------------------------------------------------------------------------------- failures


def test_a_poisoned_shard_is_listed_and_not_tried_again_and_the_others_are_finished(
    deit: World, tmp_path: Path, client: Client
) -> None:
    def note(task: ShardTask, path: str) -> None:
        with open(path, "a") as file:  # noqa: PTH123
            file.write(task.url + "\n")

    place = seeded(deit, tmp_path / "store")
    corrupt = rewritten(
        deit.shards[1],
        tmp_path / "corrupt-000000.tar",
        lambda number, ending, data: data[:50] if (number, ending) == (66, "png") else data,
    )
    cut = tmp_path / "cut-000000.tar"
    cut.write_bytes(Path(deit.shards[1]).read_bytes()[:100_000])
    shards = [deit.shards[0], corrupt, str(cut), deit.shards[2]]
    with hooked(client, note, str(tmp_path / "begun")):
        result, lines = run(deit, place, shards, dask=address_of(client))
    failed = {failure["shard"]: failure for failure in result["failures"]}
    assert failed.keys() == {corrupt, str(cut)}
    assert {failure["kind"] for failure in failed.values()} == {"data"}
    assert "key 'shard-000001-00066'" in failed[corrupt]["error"]
    assert str(cut) in failed[str(cut)]["error"]
    assert len(result["shards"]) == 2
    assert sum(line.startswith("failed: ") for line in lines) == 2
    assert sorted(begun(tmp_path / "begun")) == sorted(shards), "each was begun once"
    assert attempts(place) == counted(place)
    assert len(counted(place)) == 2 * 2 * 3
    run(deit, place, dask=address_of(client))
    assert_same(contents(place), contents(deit.store))


def assert_lists(cut: Path, out: str, err: str) -> None:
    """That a command says that one of four shards failed."""
    result = json.loads(out)
    assert [(failure["shard"], failure["kind"]) for failure in result["failures"]] == [(str(cut), "data")]
    assert len(result["shards"]) == 3
    assert "Traceback" not in err
    assert str(cut) in err


@pytest.fixture
def cut(deit: World, tmp_path: Path) -> Path:
    """A shard that ends in the middle of a file."""
    path = tmp_path / "cut-000000.tar"
    path.write_bytes(Path(deit.shards[1]).read_bytes()[:100_000])
    return path


def test_the_command_exits_with_1_and_lists_a_shard_that_failed(
    deit: World, tmp_path: Path, cut: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = seeded(deit, tmp_path / "store")
    with pytest.raises(SystemExit) as ended:
        main(words(deit, place, [str(cut), *deit.shards], "--json"))
    said = capsys.readouterr()
    assert ended.value.code == 1, said.err
    assert_lists(cut, said.out, said.err)


@pytest.mark.slow
def test_the_command_on_workers_lists_it_too_and_leaves_no_process(deit: World, tmp_path: Path, cut: Path) -> None:
    place = seeded(deit, tmp_path / "store")
    process = start(command(deit, place, [str(cut), *deit.shards], "--json", "--workers", "2"))
    out, err = process.communicate(timeout=HANGS)
    assert process.returncode == 1, err.decode()
    assert_lists(cut, out.decode(), err.decode())
    until(lambda: not processes_of(process.pid), "a child process was left")


@pytest.mark.parametrize("position", [SLOW(0), 1, SLOW(4)])
def test_a_shard_that_kills_its_workers_is_listed_and_the_others_are_finished(
    deit: World, tmp_path: Path, mortal: Client, position: int
) -> None:
    def die(task: ShardTask, path: str) -> None:
        import os

        with open(path, "a") as file:  # noqa: PTH123
            file.write(task.url + "\n")
        if "deadly" in task.url:
            os._exit(1)

    place = seeded(deit, tmp_path / "store")
    deadly = copies(deit.shards, tmp_path / "deadly", 1)
    good = copies(deit.shards, tmp_path / "good", 4)
    shards = [*good[:position], *deadly, *good[position:]]
    with hooked(mortal, die, str(tmp_path / "begun")):
        result, _ = run(deit, place, shards, dask=address_of(mortal))
    assert [(failure["shard"], failure["kind"]) for failure in result["failures"]] == [(deadly[0], "worker")]
    told = result["failures"][0]["error"]
    assert "workers that had it died, the last at tcp://" in told
    assert "memory ran out" in told
    assert "start fewer by `workers=N`" in told
    assert len(result["shards"]) == 4
    print("begun", {Path(url).parent.name: begun(tmp_path / "begun").count(url) for url in shards})


@pytest.mark.slow
def test_with_one_worker_a_shard_that_kills_it_takes_no_other_with_it(deit: World, tmp_path: Path) -> None:
    def die(task: ShardTask) -> None:
        import os

        if "deadly" in task.url:
            os._exit(1)

    place = seeded(deit, tmp_path / "store")
    deadly, good = copies(deit.shards, tmp_path / "deadly", 1), copies(deit.shards, tmp_path / "good", 3)
    with local_cluster(1) as alone, Client(alone, set_as_default=False) as client, hooked(client, die):
        result, _ = run(deit, place, [*deadly, *good], dask=alone.scheduler_address)
    assert [(failure["shard"], failure["kind"]) for failure in result["failures"]] == [(deadly[0], "worker")]
    assert len(result["shards"]) == 3


@pytest.mark.slow
def test_a_worker_that_comes_back_later_than_dask_waits_for_it_is_not_given_up(
    deit: World, expected: Any, tmp_path: Path
) -> None:
    place = seeded(deit, tmp_path / "store")
    slow = {**os.environ, "DASK_DISTRIBUTED__DEPLOY__LOST_WORKER_TIMEOUT": "1ms"}  # no process starts as soon as that
    process = start(command(deit, place, deit.shards, "--workers", "1"), env=slow)
    try:
        (worker,) = until(lambda: workers_of(process.pid) or process.poll() is not None, "no worker started")
        until(lambda: markers(place) or process.poll() is not None, "no work began")
        os.kill(worker, signal.SIGKILL)
        _, err = process.communicate(timeout=HANGS)
    finally:
        end(process)
    assert process.returncode == 0, err.decode()
    assert_same(contents(place), expected)


def workers_of(session: int) -> list[int]:
    """Ids of the processes that a command has spawned for work."""
    commands = {number: Path(f"/proc/{number}/cmdline") for number in processes_of(session)}
    return [number for number, path in commands.items() if b"spawn_main" in path.read_bytes()]


def test_faults_of_input_and_output_are_tried_again_with_pauses_and_others_are_not(
    deit: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    tried: list[int] = []
    raised: list[Exception] = []

    def fail(*arguments: Any) -> Outcome:
        tried.append(1)
        if raised:
            raise raised.pop(0)
        return Outcome(shard=open_shard(deit.shards[0]))

    monkeypatch.setattr("time.sleep", slept.append)
    monkeypatch.setattr(dask_runner, "run_task", fail)
    task = ShardTask(
        store=Store.open(deit.store),
        url="u.tar",
        policy=policy("light", 32),
        teacher="t",
        graph="g",
        outputs=(),
        views=1,
    )

    def attempt(*errors: Exception) -> tuple[Any, int, list[float]]:
        slept.clear()
        tried.clear()
        raised[:] = errors
        return dask_runner.attempt(task, "cpu", 1, lambda done, todo: None), len(tried), list(slept)

    fault = OSError(errno.EIO, "Input/output error", "/a/file")
    outcome, count, pauses = attempt(fault, fault)
    assert isinstance(outcome, Outcome)
    assert count == 3
    assert all(0.5 * of <= pause <= 1.5 * of for pause, of in zip(pauses, dask_runner.BACKOFF, strict=False))
    outcome, count, pauses = attempt(*[fault] * 10)
    assert outcome == Failure(shard="u.tar", error="u.tar: /a/file: Input/output error", kind="io")
    assert count == len(dask_runner.BACKOFF) + 1
    assert len(pauses) == len(dask_runner.BACKOFF)
    kinds = {
        "data": UserError("key 'a': no image"),
        "io": OSError(errno.ENOSPC, "No space left"),
        "bug": ValueError("oh"),
    }
    for kind, error in kinds.items():
        outcome, count, pauses = attempt(error)
        assert (outcome.kind, count, pauses) == (kind, 1, [])


def test_on_workers_faults_of_input_and_output_are_tried_again(
    deit: World, expected: Any, tmp_path: Path, client: Client
) -> None:
    def fail(task: ShardTask, path: str) -> None:
        import errno

        with open(path, "a+") as file:  # noqa: PTH123
            file.write(task.url + "\n")
            file.flush()
            file.seek(0)
            times = file.read().split().count(task.url)
        if task.url.endswith("-000001.tar") and times < 3:
            raise OSError(errno.ESTALE, "Stale file handle", task.url)

    place = seeded(deit, tmp_path / "store")
    with hooked(client, fail, str(tmp_path / "begun")):
        result, _ = run(deit, place, dask=address_of(client))
    assert not result["failures"]
    assert [begun(tmp_path / "begun").count(url) for url in deit.shards] == [1, 3, 1]
    assert_same(contents(place), expected)


# ---------------------------------------------------------------------------------------------- much of everything


@pytest.mark.long
def test_two_thousand_shards_are_handed_over_as_workers_get_free_and_take_little_memory(
    tmp_path: Path, machines: Any, client: Client
) -> None:
    rng = np.random.default_rng(0)
    images = [encoded(synthetic_image(label, rng)) for label in range(4)]
    shards = [tar(tmp_path / "data" / f"s-{n:06d}.tar", 4, images) for n in range(2000)]
    taken = answered = most = 0
    early = 0

    def tasks(made: Bare, urls: list[str]) -> Iterator[ShardTask]:
        nonlocal taken, early
        for url in urls:
            taken += 1
            early = max(early, taken - answered)
            yield made.task(url, views=1)

    def drive(outcomes: Iterator[tuple[str, Any]]) -> None:
        nonlocal answered
        for url, outcome in outcomes:
            assert isinstance(outcome, Outcome), (url, outcome)
            answered += 1

    here = bare(tmp_path / "here", "light")
    drive(dask_runner.run_in_process(tasks(here, shards[:400]), 400, "cpu", Silent()))
    assert early == 1
    two = bare(tmp_path / "two", "light")
    over = threading.Event()

    def look() -> None:
        nonlocal most
        while not over.wait(0.01):
            most = max(most, len(machines.scheduler.tasks))

    looker = threading.Thread(target=look)
    looker.start()
    before = resident()
    taken = answered = 0
    drive(dask_runner.run_on_cluster(client, tasks(two, shards), 2000, "cpu", 1, progress=Silent()))
    over.set()
    looker.join()
    growth = resident() - before
    assert answered == 2000
    print(f"client with scheduler grew by {growth:.0f} MiB; at most {most} tasks known, {early} ahead")
    assert most <= 2 * 2 * 2
    assert early <= 2 * 2 + 1
    assert growth < 200
    assert len(two.store.done()) == 4000


def resident() -> float:
    """MiB of this process."""
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("VmRSS")) / 1024
