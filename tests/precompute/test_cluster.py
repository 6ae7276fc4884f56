"""Many shards at once: the same store on any workers, and what becomes of it when shards, workers or runs break."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import onnx
import pytest
from dask.base import get_scheduler
from distributed import Client, LocalCluster, WorkerPlugin
from PIL import Image

from precompute import cluster
from precompute.run import Wanted, precompute
from precompute.targets import parse
from precompute.tasks import Outcome, Output, ShardTask
from storage import banks, records
from storage.errors import UserError
from storage.policies import policy
from storage.progress import Quiet as Silent
from storage.store import Store
from storage.testing import TINY_CNN, synthetic_image, synthetic_shards
from tests.conftest import Quiet, World, teacher_of
from tests.precompute.stores import assert_same, attempts, contents, counted, failures, rewritten, seeded

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers take hooks of this file without importing it

REPOSITORY = Path(__file__).parents[2]
WISHES = ["activations,grid=8,codec=u8", "activations,grid=8,codec=f16"]
SAMPLES = 70  # two blocks
SLOW = partial(pytest.param, marks=pytest.mark.slow)


# ---------------------------------------------------------------------------------------------- helpers


@pytest.fixture(scope="module")
def deit(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Three small shards and the store that an undisturbed run in this process makes of them under `deit`."""
    folder = tmp_path_factory.mktemp("deit")
    shards = synthetic_shards(folder / "data", shards=3, samples=SAMPLES, seed=5)
    made = dataclasses.replace(world, folder=folder, shards=shards, store=folder / "store", targets={})
    result, _ = run(made, made.store)
    assert not result["failures"]
    return made


@pytest.fixture(scope="module")
def expected(deit: World) -> Any:
    return contents(deit.store)


def local(count: int) -> LocalCluster:
    """So many workers of one thread each, and a scheduler in this process."""
    return LocalCluster(n_workers=count, threads_per_worker=1, dashboard_address="127.0.0.1:0", silence_logs=50)


@pytest.fixture(scope="module")
def machines() -> Iterator[Any]:
    """Two workers that many runs join."""
    with local(2) as place:
        yield place


@pytest.fixture
def client(machines: Any) -> Iterator[Client]:
    with Client(machines.scheduler_address, set_as_default=False) as connected:
        connected.wait_for_workers(2, timeout=60)
        yield connected


@pytest.fixture
def mortal() -> Iterator[Client]:
    """Two workers of one test, which kills them: whether they come back in time is nobody else's matter."""
    with local(2) as place, Client(place, set_as_default=False) as connected:
        yield connected


def run(world: World, store: Path, shards: list[str] | None = None, **more: Any) -> tuple[dict[str, Any], list[str]]:
    """Precompute under `deit`, two views; what it gives and what it says."""
    wishes = [wish for text in WISHES for wish in parse(text)]
    quiet = Quiet()
    wanted = Wanted(
        world.shards if shards is None else shards, teacher_of(world.weights, "cnn"), wishes, policy("deit", 32),
        frozenset({"line", "size"}), 2, provider="cpu", **more,
    )  # fmt: skip
    cluster._held.clear()
    return precompute(Store.create(store), wanted, quiet), quiet.lines


def command(world: World, store: Path, shards: list[str], *more: str) -> list[str]:
    """The same as `run`, as people type it."""
    return [
        sys.executable, "-m", "pipeline", "precompute", "--teacher", TINY_CNN[0], "--weights", world.weights["cnn"],
        "--teacher-arg", "channels=[8,12,16,24]", "--teacher-arg", "stem_width=8", "--teacher-arg", "num_classes=3",
        "--input-size", "64", "--mean", "0.5", "--std", "0.5", "--as", "cnn", *(f"--target={wish}" for wish in WISHES),
        *(f"--shards={shard}" for shard in shards), "--store", str(store), "--view-policy", "deit",
        "--view-size", "32", "--view-count", "2", "--provider", "cpu", *more,
    ]  # fmt: skip


def start(words: list[str], **more: Any) -> subprocess.Popen[bytes]:
    """A command as the leader of a session of its own, so that its children can be told from others."""
    pipe = subprocess.PIPE
    return subprocess.Popen(words, cwd=REPOSITORY, start_new_session=True, stdout=pipe, stderr=pipe, **more)


def processes_of(session: int) -> dict[int, str]:
    """Process id -> state of every process of a session; those that ended and wait for their parent do not count."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found[int(path.parent.name)] = fields[0]
    return found


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a command that a test started, with all of its children."""
    for number in processes_of(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    process.communicate(timeout=30)


def until(true: Callable[[], Any], seconds: float = 60, what: str = "") -> Any:
    """What a call gives as soon as that is true."""
    limit = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < limit, what or "waited in vain"
        time.sleep(0.02)
    return found


def markers(store: Path) -> int:
    return len(list(store.glob("done/*.json")))


def copies(shards: list[str], folder: Path, count: int) -> list[str]:
    """So many shards of other names with the contents of these."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"copy-{i:06d}.tar" for i in range(count)]
    for i, path in enumerate(paths):
        path.write_bytes(Path(shards[i % len(shards)]).read_bytes())
    return [str(path) for path in paths]


class Hook(WorkerPlugin):
    """On every worker, also on one that replaces a dead one: `act(task, *arguments)` before a task is begun."""

    name = "hook"

    def __init__(self, act: Callable[..., None], *arguments: Any) -> None:
        self.act, self.arguments = act, arguments

    def setup(self, worker: Any) -> None:
        from precompute import cluster as there

        act, arguments, real = self.act, self.arguments, there.run_task
        self.real, self.backoff = real, there.BACKOFF
        there.BACKOFF = (0.01, 0.01, 0.01)

        def hooked(task: ShardTask, *rest: Any) -> Outcome:
            act(task, *arguments)
            return real(task, *rest)

        there.run_task = hooked

    def teardown(self, worker: Any) -> None:
        from precompute import cluster as there

        there.run_task, there.BACKOFF = self.real, self.backoff


@contextlib.contextmanager
def hooked(client: Client, act: Callable[..., None], *arguments: Any) -> Iterator[None]:
    client.register_plugin(Hook(act, *arguments))
    try:
        yield
    finally:
        client.unregister_worker_plugin("hook")


def begun(path: str | Path) -> list[str]:
    """The lines that workers have added to a file: one for every beginning."""
    return Path(path).read_text().split() if Path(path).exists() else []


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
    result, _ = run(deit, place, dask=client.scheduler.address)
    assert result["written"] == 12
    assert_same(contents(place), expected)

    def heavy() -> list[str]:
        import sys

        assert "precompute.engine" in sys.modules
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
        deit.shards[1], tmp_path / "corrupt-000000.tar",
        lambda number, ending, data: data[:50] if (number, ending) == (66, "png") else data,
    )  # fmt: skip
    cut = tmp_path / "cut-000000.tar"
    cut.write_bytes(Path(deit.shards[1]).read_bytes()[:100_000])
    shards = [deit.shards[0], corrupt, str(cut), deit.shards[2]]
    with hooked(client, note, str(tmp_path / "begun")):
        result, lines = run(deit, place, shards, dask=client.scheduler.address)
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
    run(deit, place, dask=client.scheduler.address)
    assert_same(contents(place), contents(deit.store))


@pytest.mark.parametrize("workers", [0, SLOW(2)])
def test_the_command_exits_with_1_and_lists_a_shard_that_failed(deit: World, tmp_path: Path, workers: int) -> None:
    place = seeded(deit, tmp_path / "store")
    cut = tmp_path / "cut-000000.tar"
    cut.write_bytes(Path(deit.shards[1]).read_bytes()[:100_000])
    more = ["--workers", str(workers)] if workers else []
    process = start(command(deit, place, [str(cut), *deit.shards], "--json", *more))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1, err.decode()
    result = json.loads(out)
    assert [(failure["shard"], failure["kind"]) for failure in result["failures"]] == [(str(cut), "data")]
    assert len(result["shards"]) == 3
    assert b"Traceback" not in err
    assert str(cut) in err.decode()
    until(lambda: not processes_of(process.pid), 5, "a child process was left")


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
        result, _ = run(deit, place, shards, dask=mortal.scheduler.address)
    assert [(failure["shard"], failure["kind"]) for failure in result["failures"]] == [(deadly[0], "worker")]
    assert "died" in result["failures"][0]["error"]
    assert len(result["shards"]) == 4
    print("begun", {Path(url).parent.name: begun(tmp_path / "begun").count(url) for url in shards})


def test_with_one_worker_a_shard_that_kills_it_takes_no_other_with_it(deit: World, tmp_path: Path) -> None:
    def die(task: ShardTask) -> None:
        import os

        if "deadly" in task.url:
            os._exit(1)

    place = seeded(deit, tmp_path / "store")
    deadly, good = copies(deit.shards, tmp_path / "deadly", 1), copies(deit.shards, tmp_path / "good", 3)
    with local(1) as alone, Client(alone, set_as_default=False) as client, hooked(client, die):
        result, _ = run(deit, place, [*deadly, *good], dask=alone.scheduler_address)
    assert [(failure["shard"], failure["kind"]) for failure in result["failures"]] == [(deadly[0], "worker")]
    assert len(result["shards"]) == 3


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
        return Outcome("shard", 1)

    monkeypatch.setattr(cluster.time, "sleep", slept.append)
    monkeypatch.setattr(cluster, "run_task", fail)
    task = ShardTask(Store.open(deit.store), "u.tar", "b", "t", "g", (), 1)

    def attempt(*errors: Exception) -> tuple[Any, int, list[float]]:
        slept.clear(), tried.clear()
        raised[:] = errors
        return cluster.attempt(task, "cpu", 1, lambda done, todo: None), len(tried), list(slept)

    fault = OSError(errno.EIO, "Input/output error", "/a/file")
    outcome, count, pauses = attempt(fault, fault)
    assert isinstance(outcome, Outcome)
    assert count == 3
    assert all(0.5 * of <= pause <= 1.5 * of for pause, of in zip(pauses, cluster.BACKOFF, strict=False))
    outcome, count, pauses = attempt(*[fault] * 10)
    assert outcome == cluster.Failure("u.tar: /a/file: Input/output error", "io")
    assert count == len(cluster.BACKOFF) + 1
    assert len(pauses) == len(cluster.BACKOFF)
    kinds = {
        "data": UserError("key 'a': no image"), "io": OSError(errno.ENOSPC, "No space left"), "bug": ValueError("oh"),
    }  # fmt: skip
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
        result, _ = run(deit, place, dask=client.scheduler.address)
    assert not result["failures"]
    assert [begun(tmp_path / "begun").count(url) for url in deit.shards] == [1, 3, 1]
    assert_same(contents(place), expected)


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


# ---------------------------------------------------------------------------------------------- interrupts


@pytest.mark.parametrize("workers", [0, SLOW(2)], ids=["in one process", "on workers"])
@pytest.mark.parametrize("number", [signal.SIGINT, SLOW(signal.SIGTERM)], ids=["SIGINT", "SIGTERM"])
def test_contract_13_an_interrupt_ends_a_run_with_one_message_and_nothing_left_over(
    deit: World, tmp_path: Path, number: signal.Signals, workers: int
) -> None:
    place, shards = seeded(deit, tmp_path / "store"), copies(deit.shards, tmp_path / "data", 24)
    process = start(command(deit, place, shards, *(["--workers", str(workers)] if workers else [])))
    try:
        until(lambda: markers(place) or process.poll() is not None, what="no work began")
        assert process.poll() is None
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        _, err = process.communicate(timeout=60)
        said = err.decode()
        assert process.returncode == 128 + number, said
        assert "Traceback" not in said
        assert said.count("error: ") == 1
        assert said.splitlines()[-1].startswith("error: interrupted; what was complete stays"), said
        until(lambda: not processes_of(process.pid), 5, "a child process was left")
    finally:
        end(process)
    done = markers(place)
    assert 0 < done < 24 * 6
    assert attempts(place) == counted(place)
    assert not run(deit, place, shards)[0]["failures"]
    assert markers(place) == 24 * 6
    assert attempts(place) == counted(place)
    assert not failures(place, [])


@pytest.mark.slow
def test_contract_3_ten_kills_at_random_moments_and_the_same_command_each_time(deit: World, tmp_path: Path) -> None:
    shards = copies(deit.shards, tmp_path / "data", 30)
    undisturbed = seeded(deit, tmp_path / "undisturbed")
    run(deit, undisturbed, shards)
    chance = random.Random(7)
    place = tmp_path / "store"
    hits = 0
    for number in range(10):
        if markers(place) == 30 * 6:
            place = tmp_path / f"store-{number}"  # complete already: the next ones hit another store
        said = tmp_path / f"said-{number}"
        before = markers(place)
        with said.open("wb") as file:
            words = command(deit, place, shards, *(["--workers", "2"] if number % 2 else []))
            process = subprocess.Popen(words, cwd=REPOSITORY, start_new_session=True, stdout=file, stderr=file)
        if number in (4, 7):  # while it starts: imports, the export, the workers
            time.sleep(chance.uniform(0, 6))
        else:
            until(lambda said=said: ": 30 shard(s)" in said.read_text())  # type: ignore[misc]
            time.sleep(chance.uniform(0, 1))
        working = process.poll() is None and ": 30 shard(s)" in said.read_text()
        end(process)
        hits += working
        print(f"kill {number}: {'at work' if working else 'not at work'}, {before} -> {markers(place)} markers")
    places = [path for path in tmp_path.glob("store*") if path.is_dir()]
    for left in places:
        done = subprocess.run(command(deit, left, shards), cwd=REPOSITORY, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
        assert_same(contents(left), contents(undisturbed))
        assert not failures(left, shards)
    print(f"{hits} of 10 kills hit while work was going on, {len(places)} store(s)")
    assert hits >= 6


# ---------------------------------------------------------------------------------------------- much of everything


@dataclasses.dataclass(frozen=True)
class Bare:
    """A store with a teacher that only averages pixels: `[n, 3, grid, grid]`. Nothing is exported."""

    folder: Path
    store: Store
    bank: str
    graph: str
    output: Output

    def task(self, url: str, views: int = 2) -> ShardTask:
        return ShardTask(self.store, url, self.bank, "averages", self.graph, (self.output,), views)


def bare(folder: Path, line: str = "deit", size: int = 32, codec: str = "u8") -> Bare:
    from onnx import TensorProto, helper

    grid = 8
    side, views = size // grid, policy(line, size)
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("Transpose", ["floats"], ["planes"], perm=[0, 3, 1, 2]),
            helper.make_node("AveragePool", ["planes"], ["maps"], kernel_shape=[side, side], strides=[side, side]),
        ],
        "averages",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", size, size, 3])],
        [helper.make_tensor_value_info("maps", TensorProto.FLOAT, ["n", 3, grid, grid])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    store = Store.create(folder)
    store.add_bank(views.bank, views.identity, banks.describe(views))
    store.add_teacher("averages", {"weights": "none"}, {})
    digest = store.add_graph("averages", model.SerializeToString())
    identity = {"teacher": "averages", "bank": views.bank, "tap": "activations", "layers": None, "grid": grid,
                "codec": codec}  # fmt: skip
    id = f"averages-activations-{codec}-{records.digest_of(identity)[:8]}"
    about = {"teacher": "averages", "graph": digest, "output": 0, "sample_shape": [3, grid, grid], "maps": 2,
             "axes": ["map", "y", "x"], "values": "plain"}  # fmt: skip
    return Bare(folder, store, views.bank, digest, Output.of(store.add_target(id, identity, about)))


def tar(path: Path, count: int, images: list[bytes], ending: str = "png") -> str:
    """A shard of so many samples that takes no time to make: a few images under many keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as file:
        for i in range(count):
            data = images[i % len(images)]
            info = tarfile.TarInfo(f"{path.stem}-{i:06d}.{ending}")
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return str(path)


def encoded(image: Image.Image, kind: str = "PNG", **more: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return buffer.getvalue()


MEASURED = """
import json, pickle, sys
from precompute.engine import run_task
from precompute.session import open_session

with open(sys.argv[1], "rb") as file:
    task = pickle.load(file)

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) / 1024

session = open_session(task.store.graph(task.teacher, task.graph), "cpu", 1)
before = status("VmRSS")
outcome = run_task(task, lambda: session, 2)
assert "torch" not in sys.modules
print(json.dumps({"samples": outcome.samples, "before": before, "peak": status("VmHWM")}))
"""


def peak(task: ShardTask, folder: Path) -> dict[str, float]:
    """MiB before and at the peak of a task in a process that does nothing else."""
    import pickle

    path = folder / "task.pickle"
    path.write_bytes(pickle.dumps(task))
    words = [sys.executable, "-c", MEASURED, str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr.decode()
    found: dict[str, float] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_contract_7_the_peak_of_memory_does_not_depend_on_the_length_of_the_shard(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [encoded(synthetic_image(label, rng)) for label in range(10)]
    made = bare(tmp_path / "store")
    short, long = (peak(made.task(tar(tmp_path / f"{n}.tar", n, images)), tmp_path) for n in (500, 5000))
    assert (short["samples"], long["samples"]) == (500, 5000)
    ratio = long["peak"] / short["peak"]
    print(f"peak {short['peak']:.0f} MiB for 500, {long['peak']:.0f} MiB for 5,000 samples: {ratio:.3f}; "
          f"{short['before']:.0f} MiB before")  # fmt: skip
    assert ratio <= 1.15


@pytest.mark.slow
def test_contract_7_large_photos_stay_within_bounds(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (750, 1000, 3), np.uint8))
    photo = encoded(small.resize((4000, 3000), Image.Resampling.BICUBIC), "JPEG", quality=85)
    made = bare(tmp_path / "store", size=224)
    found = peak(made.task(tar(tmp_path / "photos.tar", 80, [photo], "jpg"), views=1), tmp_path)
    print(f"80 photos of {len(photo) / 2**20:.1f} MiB: peak {found['peak']:.0f} MiB, {found['before']:.0f} MiB before")
    assert found["peak"] < 1200


@pytest.mark.slow
def test_two_thousand_shards_cost_little_each_and_are_handed_over_as_workers_get_free(
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

    def drive(outcomes: Iterator[tuple[str, Any]]) -> float:
        nonlocal answered
        began = time.monotonic()
        for url, outcome in outcomes:
            assert isinstance(outcome, Outcome), (url, outcome)
            answered += 1
        return time.monotonic() - began

    here = bare(tmp_path / "here", "light")
    plain = drive(cluster.run_here(tasks(here, shards[:400]), 400, "cpu", Silent())) / 400
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
    each = drive(cluster.run_on(client, tasks(two, shards), 2000, "cpu", 1, Silent())) / 2000
    over.set()
    looker.join()
    growth = resident() - before
    assert answered == 2000
    print(f"{1000 * plain:.1f} ms a shard in one process, {1000 * each:.1f} ms on two workers: {each / plain:.2f}; "
          f"client with scheduler grew by {growth:.0f} MiB; at most {most} tasks known, {early} ahead")  # fmt: skip
    assert most <= 2 * 2 * 2
    assert early <= 2 * 2 + 1
    assert growth < 200
    assert len(two.store.done()) == 4000
    one = bare(tmp_path / "one", "light")
    with (
        local(1) as alone,
        Client(alone, set_as_default=False) as single,
    ):
        drive(cluster.run_on(single, tasks(one, shards[:20]), 20, "cpu", 1, Silent()))
        alone_each = drive(cluster.run_on(single, tasks(one, shards[20:420]), 400, "cpu", 1, Silent())) / 400
    print(f"{1000 * alone_each:.1f} ms a shard on one worker: two give {alone_each / each:.2f} times as many")
    assert math.isfinite(each)


def resident() -> float:
    """MiB of this process."""
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("VmRSS")) / 1024
