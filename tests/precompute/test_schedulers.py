"""Schedulers and workers that others started, and workers that freeze or die: joined, told and outlived."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dask.base import get_scheduler
from distributed import Client

from precompute import cluster
from precompute.tasks import ShardTask
from storage.errors import UserError
from tests.conftest import Quiet, World
from tests.precompute.clusters import SLOW, command, copies, end, hooked, processes_of, run, start, until
from tests.precompute.stores import REPOSITORY, assert_same, attempts, contents, counted, failures, seeded

# ---------------------------------------------------------------------------------------------- running schedulers


class Scheduler:
    """A scheduler and workers as people start them, each a process of its own."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder, self.processes = folder, []
        self.environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **settings}
        for part in ("scheduler", "worker"):
            (folder / part).mkdir(parents=True)
        file = folder / "scheduler.json"
        self._start("scheduler", "--port", "0", "--dashboard-address", "127.0.0.1:0", "--host", "127.0.0.1",
                    "--scheduler-file", str(file))  # fmt: skip

        def address() -> str | None:
            with contextlib.suppress(OSError, ValueError):
                return str(json.loads(file.read_text())["address"])
            return None

        self.address = until(address, what="no scheduler")

    def _start(self, part: str, *words: str, **environment: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{part}-{len(self.processes)}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "dask", part, *words], cwd=self.folder / part, stdout=log, stderr=log,
                env={**self.environment, **environment}, start_new_session=True,
            )  # fmt: skip
        self.processes.append(process)
        return process

    def worker(self, *words: str, **environment: str) -> subprocess.Popen[bytes]:
        return self._start(
            "worker", self.address, "--nthreads", "1", "--no-dashboard", "--local-directory", str(self.folder), *words,
            **environment,
        )  # fmt: skip

    def log(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("*.log")))

    def close(self) -> None:
        for process in self.processes:
            end(process)


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[Callable[..., Scheduler]]:
    made: list[Scheduler] = []

    def make(**settings: str) -> Scheduler:
        made.append(Scheduler(tmp_path / f"dask-{len(made)}", **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_running_scheduler_is_joined_and_relative_paths_are_those_of_the_command(
    deit: World, expected: Any, tmp_path: Path, scheduler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = seeded(deit, tmp_path / "store")
    dask = scheduler()
    theirs: list[Any] = []  # where the caller's own dask collections are computed while a run has its workers
    monkeypatch.setattr(Quiet, "say", lambda self, line: theirs.append(get_scheduler()) or self.lines.append(line))
    with monkeypatch.context() as impatient:
        impatient.setattr(cluster, "PATIENCE", 0.5)
        with pytest.raises(UserError, match=r"the scheduler has no workers after .*dask worker tcp://"):
            run(deit, place, dask=dask.address)
    dask.worker("--no-nanny")
    monkeypatch.chdir(tmp_path)
    shards = [os.path.relpath(shard, tmp_path) for shard in deit.shards]
    assert not any(Path(shard).is_absolute() for shard in shards)
    result, lines = run(deit, Path("store"), shards, dask=dask.address)
    assert not result["failures"]
    assert any(line.startswith("1 worker(s)") for line in lines)
    assert set(theirs) == {None}
    assert_same(contents(place), expected)
    assert dask.processes[0].poll() is None, "a scheduler that was joined goes on"
    assert dask.processes[1].poll() is None


@pytest.mark.slow
def test_an_address_without_a_scheduler_is_a_clear_error_soon(deit: World, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match=r"--dask tcp://127.0.0.1:9: no scheduler answers there"):
        run(deit, seeded(deit, tmp_path / "store"), dask="tcp://127.0.0.1:9")
    with pytest.raises(UserError, match="--dask nonsense: no scheduler answers there"):
        run(deit, tmp_path / "store", dask="nonsense")
    assert time.monotonic() - began < 40


@pytest.mark.parametrize(("method", "calls"), [("nthreads", 0), ("nthreads", 1), ("submit", 1)])
def test_a_closed_connection_is_told_the_same_way_whoever_meets_it_first(
    deit: World, tmp_path: Path, scheduler: Any, monkeypatch: pytest.MonkeyPatch, method: str, calls: int
) -> None:
    import distributed

    place, shards = seeded(deit, tmp_path / "store"), copies(deit.shards, tmp_path / "data", 3)
    dask = scheduler()
    dask.worker("--no-nanny")
    working, left = getattr(distributed.Client, method), iter([True] * calls)

    def breaking(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(left, False):
            return working(self, *args, **kwargs)
        raise distributed.comm.CommClosedError("in <TCP (closed)>: Stream is closed")

    monkeypatch.setattr(distributed.Client, method, breaking)
    with pytest.raises(UserError, match="the connection to the scheduler was lost; the same command goes on"):
        run(deit, place, shards, dask=dask.address)


@pytest.mark.slow
def test_a_scheduler_that_goes_away_is_a_clear_error_and_the_same_command_goes_on(
    deit: World, tmp_path: Path, scheduler: Any
) -> None:
    place, shards = seeded(deit, tmp_path / "store"), copies(deit.shards, tmp_path / "data", 20)
    dask = scheduler()
    dask.worker("--no-nanny")
    process = start(command(deit, place, shards, "--dask", dask.address))
    try:
        begun = lambda: any(place.glob("done/target.*.json"))  # noqa: E731
        until(lambda: begun() or process.poll() is not None, what="no work began")
        dask.close()
        _, err = process.communicate(timeout=120)
    finally:
        end(process)
    assert process.returncode == 1, err.decode()
    assert err.decode().count("\nerror: ") == 1
    assert "the connection to the scheduler was lost" in err.decode()
    assert "Traceback" not in err.decode()
    result, _ = run(deit, place, shards)
    assert len(result["shards"]) == 20
    assert result["written"] < 20 * 4
    assert not failures(place, [])


# ---------------------------------------------------------------------------------------------- contract 6

# Loaded by a worker that `dask worker --preload` starts: it stops itself in the middle of the first task.
STOPS_ITSELF = """
import os, signal
from pathlib import Path
from precompute import cluster, stages

folder, where = Path(os.environ["STOP_FOLDER"]), os.environ["STOP_WHERE"]

def stop(self):
    try:
        (folder / "frozen").open("x").close()
    except FileExistsError:
        return
    (folder / "shard").write_text(self.task.url)
    os.kill(os.getpid(), signal.SIGSTOP)

def mark(self):
    if where == "mark":
        stop(self)
    real_mark(self)

def write(self, view, values, block):
    if where == "write" and view == 1:
        stop(self)
    real_write(self, view, values, block)

def run_task(task, *rest):
    try:
        outcome = real_run(task, *rest)
    finally:
        if (folder / "shard").exists() and (folder / "shard").read_text() == task.url:
            (folder / "woken").write_text("x")
    return outcome

if not hasattr(stages, "stops"):  # it is loaded twice
    stages.stops = True
    real_mark, real_write, real_run = stages.Pass._mark, stages.Pass._write, cluster.run_task
    stages.Pass._mark, stages.Pass._write, cluster.run_task = mark, write, run_task
"""


@pytest.mark.parametrize("where", [SLOW("write"), "mark"])
def test_contract_6_a_worker_given_up_for_dead_that_wakes_up_changes_nothing(
    deit: World, expected: Any, tmp_path: Path, scheduler: Any, where: str
) -> None:
    place = seeded(deit, tmp_path / "store")
    preload = tmp_path / "stops_itself.py"
    preload.write_text(STOPS_ITSELF)
    dask = scheduler(DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL="6 seconds", OMP_NUM_THREADS="1")
    victim = dask.worker("--no-nanny", "--preload", str(preload), STOP_FOLDER=str(tmp_path), STOP_WHERE=where)
    with Client(dask.address, set_as_default=False) as client:
        client.wait_for_workers(1, timeout=60)
    results: list[Any] = []
    other = threading.Thread(target=lambda: results.append(run(deit, place, dask=dask.address)))
    other.start()
    try:
        until((tmp_path / "shard").exists, 20, "nothing was frozen")
        until(lambda: set(processes_of(victim.pid).values()) == {"T"})
        dask.worker("--no-nanny")
        other.join(timeout=120)
        assert results, dask.log()
        assert processes_of(victim.pid)[victim.pid] == "T", "it slept until the run was over"
        result, _ = results[0]
        assert not result["failures"]
        assert_same(contents(place), expected)
        assert attempts(place) > counted(place), "what the sleeper had begun lies about"
        before = {path: path.read_bytes() for path in place.glob("done/*")}
    finally:
        os.kill(victim.pid, signal.SIGCONT)
    until(lambda: (tmp_path / "woken").exists() or victim.poll() is not None, what=dask.log())
    print("the woken worker ended its task:", (tmp_path / "woken").exists())
    until(lambda: victim.poll() is not None, what="the scheduler does not know it any more, so it ends")
    assert {path: path.read_bytes() for path in place.glob("done/*")} == before
    assert_same(contents(place), expected)
    assert not failures(place, deit.shards)
    assert not run(deit, place)[0]["written"]


def test_contract_6_a_worker_killed_in_the_middle_of_a_write_is_replaced_and_the_run_completes(
    deit: World, expected: Any, tmp_path: Path, mortal: Client
) -> None:
    def kill_in_a_write(task: ShardTask, folder: str) -> None:
        import os
        import signal
        from pathlib import Path

        from storage.objects import LocalObjects

        killed = Path(folder) / "killed"
        if killed.exists() or getattr(LocalObjects, "deadly", False):
            return
        real = LocalObjects._write
        LocalObjects.deadly = True  # type: ignore[attr-defined]

        def write(self: Any, path: Path, data: bytes) -> None:
            if "/1/" in str(path) and "targets" in str(path) and not killed.exists():
                killed.touch()
                path.write_bytes(data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            real(self, path, data)

        LocalObjects._write = write  # type: ignore[method-assign]

    place = seeded(deit, tmp_path / "store")
    with hooked(mortal, kill_in_a_write, str(tmp_path)):
        result, _ = run(deit, place, dask=mortal.scheduler.address)
    assert (tmp_path / "killed").exists()
    assert not result["failures"]
    assert attempts(place) > counted(place), "nobody could remove what the killed worker had begun"
    assert_same(contents(place), expected)
    assert not failures(place, deit.shards)
