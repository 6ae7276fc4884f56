"""Schedulers and workers that others started, and workers that freeze or die: joined, told and outlived."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask
import pytest
from dask.base import get_scheduler
from distributed import Client

from pipeline.cli import main
from storage.errors import UserError
from tests.conftest import HANGS, ROOT, Quiet, World
from tests.precompute.engine.clusters import (
    SLOW,
    address_of,
    command,
    copies,
    end,
    hooked,
    processes_of,
    run,
    start,
    until,
    words,
)
from tests.precompute.stores import assert_same, attempts, contents, counted, failures, seeded
from tests.typed import present

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from precompute.engine.tasks import ShardTask

# ---------------------------------------------------------------------------------------------- running schedulers


class Scheduler:
    """A scheduler and workers as people start them, each a process of its own."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT), **settings}
        for part in ("scheduler", "worker"):
            (folder / part).mkdir(parents=True)
        file = folder / "scheduler.json"
        self._start(
            "scheduler",
            "--port",
            "0",
            "--dashboard-address",
            "127.0.0.1:0",
            "--host",
            "127.0.0.1",
            "--scheduler-file",
            str(file),
        )

        def address() -> str | None:
            with contextlib.suppress(OSError, ValueError):
                return str(json.loads(file.read_text())["address"])
            return None

        self.address = until(address, what="no scheduler")

    def _start(self, part: str, *words: str, **environment: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{part}-{len(self.processes)}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "dask", part, *words],
                cwd=self.folder / part,
                stdout=log,
                stderr=log,
                env={**self.environment, **environment},
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def worker(self, *words: str, **environment: str) -> subprocess.Popen[bytes]:
        return self._start(
            "worker",
            self.address,
            "--nthreads",
            "1",
            "--no-dashboard",
            "--local-directory",
            str(self.folder),
            *words,
            **environment,
        )

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

    def say(self: Quiet, line: str) -> None:
        theirs.append(get_scheduler())
        self.lines.append(line)

    monkeypatch.setattr(Quiet, "say", say)
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


def test_a_first_worker_is_waited_for_as_long_as_was_said(deit: World, tmp_path: Path, scheduler: Any) -> None:
    place, dask = seeded(deit, tmp_path / "store"), scheduler()
    with pytest.raises(
        UserError, match=r"there are no workers after 1 s\n  Start some: dask worker tcp://.*\n.*`worker_tim"
    ):
        run(deit, place, dask=dask.address, worker_timeout=1)
    process = start(command(deit, place, deit.shards, "--dask", dask.address, "--worker-timeout", str(HANGS)))
    try:
        said = present(process.stderr)
        until(lambda: f"waiting up to {HANGS} s for the first" in said.readline().decode(), "it never waited")
        dask.worker("--no-nanny")
        _, err = process.communicate(timeout=HANGS)
    finally:
        end(process)
    assert process.returncode == 0, err.decode()


def test_workers_that_are_gone_are_waited_for_as_long_as_was_said(deit: World, tmp_path: Path, scheduler: Any) -> None:
    def leave(task: ShardTask) -> None:
        import os

        os._exit(1)

    place, dask = seeded(deit, tmp_path / "store"), scheduler()
    dask.worker("--no-nanny")
    with Client(dask.address, set_as_default=False) as client:
        client.wait_for_workers(1, timeout=HANGS)
        with (
            hooked(client, leave),
            pytest.raises(UserError, match="all workers are gone and none came back within 1 s"),
        ):
            run(deit, place, dask=dask.address, worker_timeout=1)


@pytest.mark.parametrize(("address", "why"), [("tcp://127.0.0.1:9", "after 2 s"), ("nonsense", "missing port")])
def test_an_address_without_a_scheduler_is_a_clear_error_as_soon_as_dask_gives_up(
    deit: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], address: str, why: str
) -> None:
    place = seeded(deit, tmp_path / "store")
    with dask.config.set({"distributed.comm.timeouts.connect": "2s"}), pytest.raises(SystemExit) as ended:
        main(words(deit, place, deit.shards, "--dask", address))
    assert ended.value.code == 1
    err = capsys.readouterr().err
    line, hint = [line for line in err.splitlines() if not line.startswith("store ")]
    assert line.startswith(f"error: --dask {address}: no scheduler answers at this address ("), err
    assert why in line
    assert hint.startswith("  Start one with `dask scheduler`")


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scheduler]:
    """A scheduler with a worker that several runs join one after another."""
    one = Scheduler(tmp_path_factory.mktemp("joined") / "dask")
    one.worker("--no-nanny")
    yield one
    one.close()


@pytest.mark.parametrize(("method", "calls"), [("nthreads", 0), ("nthreads", 1), ("nthreads", 2), ("submit", 1)])
def test_a_closed_connection_is_told_the_same_way_whoever_meets_it_first(
    deit: World, tmp_path: Path, joined: Scheduler, monkeypatch: pytest.MonkeyPatch, method: str, calls: int
) -> None:
    import distributed
    from distributed.comm.core import CommClosedError

    place, shards = seeded(deit, tmp_path / "store"), copies(deit.shards, tmp_path / "data", 3)
    working, left = getattr(distributed.Client, method), iter([True] * calls)

    def breaking(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(left, False):
            return working(self, *args, **kwargs)
        raise CommClosedError("in <TCP (closed)>: Stream is closed")

    monkeypatch.setattr(distributed.Client, method, breaking)
    with pytest.raises(UserError, match="the connection to the scheduler was lost; run the same command again"):
        run(deit, place, shards, dask=joined.address)


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
        _, err = process.communicate(timeout=HANGS)
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
from precompute.engine import dask_runner, stages

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
    return real_write(self, view, values, block)

def run_task(task, *rest):
    try:
        outcome = real_run(task, *rest)
    finally:
        if (folder / "shard").exists() and (folder / "shard").read_text() == task.url:
            (folder / "woken").write_text("x")
    return outcome

if not hasattr(stages, "stops"):  # it is loaded twice
    stages.stops = True
    real_mark, real_write, real_run = stages.ShardPass._mark, stages.ShardPass._write, dask_runner.run_task
    stages.ShardPass._mark, stages.ShardPass._write, dask_runner.run_task = mark, write, run_task
"""


def given_up(scheduler: str, worker: str) -> None:
    """Once another worker is there, the scheduler removes this one, as it does with one that is silent for long."""

    async def remove(dask_scheduler: Any) -> None:
        await dask_scheduler.remove_worker(worker, stimulus_id="given-up")

    with Client(scheduler, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=HANGS)
        client.run_on_scheduler(remove)


@pytest.mark.parametrize("where", [SLOW("write"), "mark"])
def test_contract_6_a_worker_given_up_for_dead_that_wakes_up_changes_nothing(
    deit: World, expected: Any, tmp_path: Path, scheduler: Any, where: str
) -> None:
    place = seeded(deit, tmp_path / "store")
    preload = tmp_path / "stops_itself.py"
    preload.write_text(STOPS_ITSELF)
    dask = scheduler(OMP_NUM_THREADS="1")
    victim = dask.worker("--no-nanny", "--preload", str(preload), STOP_FOLDER=str(tmp_path), STOP_WHERE=where)
    with Client(dask.address, set_as_default=False) as client:
        client.wait_for_workers(1, timeout=HANGS)
        (address,) = client.nthreads()
    results: list[Any] = []
    other = threading.Thread(target=lambda: results.append(run(deit, place, dask=dask.address)))
    other.start()
    try:
        until((tmp_path / "shard").exists, "nothing was frozen")
        until(lambda: set(processes_of(victim.pid).values()) == {"T"})
        dask.worker("--no-nanny")
        given_up(dask.address, address)
        other.join(timeout=HANGS)
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

        killed, real = Path(folder) / "killed", os.fsync
        if killed.exists() or real.__name__ == "deadly":
            return

        def deadly(descriptor: int) -> None:
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            if {"1", "targets"} <= set(path.parts) and path.is_file() and not killed.exists():
                killed.touch()
                os.truncate(descriptor, os.fstat(descriptor).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            real(descriptor)

        pytest.MonkeyPatch().setattr(os, "fsync", deadly)

    place = seeded(deit, tmp_path / "store")
    with hooked(mortal, kill_in_a_write, str(tmp_path)):
        result, _ = run(deit, place, dask=address_of(mortal))
    assert (tmp_path / "killed").exists()
    assert not result["failures"]
    assert attempts(place) > counted(place), "nobody could remove what the killed worker had begun"
    assert_same(contents(place), expected)
    assert not failures(place, deit.shards)
