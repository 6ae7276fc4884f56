"""Many shards: one after another here, or on dask workers. The markers in the store, not the scheduler, are the truth.

Workers are free of torch: they import this module, the engine and ONNX Runtime. A worker process runs one task at a
time with one session; the graph is read from the store once a process.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from precompute.engine import run_task
from precompute.session import Session, cores, open_session
from precompute.tasks import Outcome, ShardTask
from storage.errors import UserError, first_line, lasts
from storage.progress import Progress

if TYPE_CHECKING:
    from distributed import Client

T = TypeVar("T")

BACKOFF = (1.0, 4.0, 16.0)  # seconds before each new try after an input or output fault, give or take a half
PATIENCE = 60.0  # seconds that workers have to appear, and to lay down their work


@dataclass(frozen=True)
class Failure:
    """A shard that could not be made. `kind`: of its data, of input and output, of a worker that died, or a bug."""

    error: str
    kind: Literal["data", "io", "worker", "bug"]


class _Stopped(Exception):
    """The run was interrupted."""


# ------------------------------------------------------------------------------------------------ in one process

_one_at_a_time = threading.Lock()
_stopped: set[str] = set()  # runs whose tasks are to lay down their work


_held: dict[tuple[object, ...], Session] = {}  # the one session of this process


def _session(task: ShardTask, provider: str, threads: int) -> Session:
    key = (task.store.url, task.graph, provider, threads)
    if key not in _held:
        _held.clear()
        _held[key] = open_session(task.store.graph(task.teacher, task.graph), provider, threads)
    return _held[key]


def patiently(call: Callable[[], T]) -> T:
    """What a call gives; after an input or output fault that may pass it is called again, some time later."""
    for pause in BACKOFF:
        try:
            return call()
        except OSError as error:
            if lasts(error):
                raise
            time.sleep(pause * random.uniform(0.5, 1.5))
    return call()


def attempt(task: ShardTask, provider: str, threads: int, report: Callable[[int, int], None]) -> Outcome | Failure:
    """Run a task; input and output faults are tried again after a while, faults of the data are not.

    `report(done, todo)` is told how many view images of this try are done.
    """

    def once() -> Outcome:
        done = 0

        def say(more: int, todo: int) -> None:
            nonlocal done
            done += more
            report(done, todo)

        return run_task(task, functools.partial(_session, task, provider, threads), threads, say)

    try:
        return patiently(once)
    except UserError as error:
        return Failure(str(error), "data")
    except OSError as error:
        return Failure(f"{task.url}: {error.filename or 'input or output'}: {first_line(error)}", "io")
    except _Stopped:
        raise
    except Exception as error:
        return Failure(f"{task.url}: this should not happen: {first_line(error, kind=True)}", "bug")


class _Tracker:
    """Adds up what the tasks report; shards that have not begun are taken to be as long as the others."""

    def __init__(self, progress: Progress, shards: int) -> None:
        self.progress, self.shards = progress, shards
        self.done: dict[str, int] = {}
        self.todo: dict[str, int] = {}
        self._lock = threading.Lock()

    def __call__(self, url: str, done: int, todo: int) -> None:
        with self._lock:
            self.progress.advance(done - self.done.get(url, 0))
            self.done[url] = done
            if url not in self.todo:
                self.todo[url] = todo
                known = sum(self.todo.values())
                self.progress.expect(known + known * (self.shards - len(self.todo)) // len(self.todo))


def run_here(
    tasks: Iterator[ShardTask], count: int, provider: str, progress: Progress
) -> Iterator[tuple[str, Outcome | Failure]]:
    """Url and outcome of one task after another, in this process.

    Each runs in a thread of its own: an interrupt, which comes to the main thread, tears nothing out of its hands. The
    task is told, and lays down its work after the block that it is at.
    """
    tracker = _Tracker(progress, count)
    interrupted = threading.Event()

    def report(url: str, done: int, todo: int) -> None:
        if interrupted.is_set():
            raise _Stopped
        tracker(url, done, todo)

    with ThreadPoolExecutor(1, "task") as thread:
        for task in tasks:
            future = thread.submit(attempt, task, provider, cores(), functools.partial(report, task.url))
            try:
                outcome = future.result()
            except BaseException:
                interrupted.set()
                raise
            yield task.url, outcome


# ------------------------------------------------------------------------------------------------ on dask workers


def work(task: ShardTask, provider: str, threads: int | None, run: str) -> Outcome | Failure | None:
    """What a dask worker does with a task; None where the run was stopped."""
    from distributed import get_worker

    worker = get_worker()

    def report(done: int, todo: int) -> None:
        if run in _stopped:
            raise _Stopped
        worker.log_event(f"precompute-{run}", (task.url, done, todo))

    with _one_at_a_time:
        if run in _stopped:
            return None
        try:
            return attempt(task, provider, threads or worker.state.nthreads, report)
        except _Stopped:
            return None


def stop(run: str) -> None:
    """Runs on every worker: tasks of a run lay down their work after the block that they are at."""
    _stopped.add(run)


def versions() -> dict[str, str]:
    """Runs on every worker: what has to agree between machines."""
    from importlib.metadata import version

    from storage.views import renderer

    return {"teacher-store": version("teacher-store"), **renderer()}


@contextlib.contextmanager
def workers(count: int | None, address: str | None, say: Callable[[str], None]) -> Iterator[Client]:
    """A client of `count` worker processes on this machine, or of the scheduler at an address.

    Raises:
        UserError: no scheduler answers there, it has no workers, or they cannot import this package.
    """
    from distributed import Client, LocalCluster
    from distributed.utils import silence_logging_cmgr

    if address is None:
        cluster: Any = LocalCluster(  # type: ignore[no-untyped-call]
            n_workers=count, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
        )  # fmt: skip
    else:
        cluster = contextlib.nullcontext(address)
    # What dask logs is for its own people: whatever it means for the run is said in the run's own words.
    with silence_logging_cmgr(logging.CRITICAL), cluster as place:
        try:
            # Not the default one: whoever calls this from Python computes dask collections of their own where they did.
            client = Client(place, timeout=10, set_as_default=False)  # type: ignore[no-untyped-call]
        except (OSError, TimeoutError, ValueError) as error:
            raise UserError(
                f"--dask {address}: no scheduler answers there ({first_line(error)}); start one with "
                "`dask scheduler` and workers with `dask worker ADDRESS`"
            ) from None
        with client:
            if address is None:
                _shield(client)
            _greet(client, address, say)
            yield client


def _shield(client: Client) -> None:
    """Interrupts that reach all processes of a terminal are for this one alone: it tells the workers to stop."""
    import signal

    from distributed import WorkerPlugin

    class Shield(WorkerPlugin):
        def setup(self, worker: Any) -> None:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)

    client.register_plugin(Shield(), name="shield")


def _greet(client: Client, address: str | None, say: Callable[[str], None]) -> None:
    try:
        client.wait_for_workers(1, timeout=PATIENCE)
    except TimeoutError:
        raise UserError(
            f"--dask {address}: the scheduler has no workers after {PATIENCE:.0f} s; start some: dask worker {address}"
        ) from None
    try:
        theirs: dict[str, Any] = client.run(versions)
    except Exception as error:  # whatever importing raises there
        raise UserError(
            f"--dask {address}: the workers cannot import this package ({first_line(error, kind=True)}); install the "
            "same teacher-store there"
        ) from None
    mine = versions()
    for worker, found in theirs.items():
        for name, version in found.items():
            if version != mine.get(name):
                say(f"worker {worker} has {name} {version}, this machine {mine.get(name)}; pixels may differ")
    say(f"{len(theirs)} worker(s); dashboard: {client.dashboard_link}")


_LOST = "the connection to the scheduler was lost; the same command goes on"


@contextlib.contextmanager
def _connected() -> Iterator[None]:
    """Whatever asks the scheduler may be the first to meet a closed connection."""
    from distributed.client import ClosedClientError

    try:
        yield
    except (OSError, ClosedClientError):
        raise UserError(_LOST) from None


def _processes(client: Client) -> int:
    with _connected():
        return len(client.nthreads())  # type: ignore[no-untyped-call]


def run_on(
    client: Client, tasks: Iterator[ShardTask], count: int, provider: str, threads: int | None, progress: Progress
) -> Iterator[tuple[str, Outcome | Failure]]:
    """Url and outcome of each task as they come. Tasks are handed over as workers get free, never all at once.

    The scheduler blames a worker's death on all tasks that it had. Those that it gives up are tried once more at the
    end, each alone, so that a shard that kills its workers takes no other with it.

    Args:
        client: of the workers.
        tasks: what to do.
        count: how many tasks there are.
        provider: of the sessions.
        threads: of each session; by default as many as a worker says it has.
        progress: told how far the tasks are.
    """
    from distributed import as_completed

    run = uuid.uuid4().hex[:8]
    tracker = _Tracker(progress, count)
    client.subscribe_topic(f"precompute-{run}", lambda event: tracker(*event[1]))  # type: ignore[no-untyped-call]
    running: dict[str, ShardTask] = {}  # by the future's key
    suspects: list[ShardTask] = []  # what the workers that died had; with several, only one of them may be to blame
    alone: set[str] = set()  # urls of suspects that were tried again, one at a time
    completed: Any = as_completed(loop=client.loop)  # type: ignore[no-untyped-call]

    def fill() -> None:
        # One for each process, which runs one at a time: a second one would wait there while another may be free.
        spare = max(1, _processes(client)) - len(running)
        some = list(itertools.islice(tasks, max(0, spare)))
        if not running and not some and suspects:
            some = [suspects.pop()]
            alone.add(some[0].url)
        for task in some:
            with _connected():
                future: Any = client.submit(work, task, provider, threads, run, pure=False)
            running[future.key] = task
            completed.add(future)

    try:
        fill()
        for future in _as_they_come(client, completed):
            task = running.pop(future.key)
            outcome = _result(future, task.url)
            suspect = isinstance(outcome, Failure) and outcome.kind == "worker" and task.url not in alone
            if suspect:
                suspects.append(task)
            fill()
            if not suspect:
                yield task.url, outcome
    except BaseException:
        _lay_down(client, run, completed)
        raise
    finally:
        with contextlib.suppress(Exception):
            client.unsubscribe_topic(f"precompute-{run}")  # type: ignore[no-untyped-call]


def _as_they_come(client: Client, completed: Any) -> Iterator[Any]:
    """Futures that are done, while there are any.

    Raises:
        UserError: the scheduler is gone, or has had no worker for a while.
    """
    seen = checked = time.monotonic()
    while completed.count():
        yield from completed.next_batch(block=False)
        now = time.monotonic()
        if now - checked > 1:
            checked = now
            if _processes(client):
                seen = now
            elif now - seen > PATIENCE:
                raise UserError("all workers are gone and none came back; the same command goes on")
        time.sleep(0.005)


def _result(future: Any, url: str) -> Outcome | Failure:
    from distributed.scheduler import KilledWorker

    try:
        outcome: Outcome | Failure | None = future.result()
    except KilledWorker:
        return Failure(
            f"{url}: the workers that had it died, one after another; is the machine out of memory?", "worker"
        )
    except Exception as error:
        if future.cancelled():
            raise UserError(_LOST) from None
        return Failure(f"{url}: {first_line(error, kind=True)}", "worker")
    assert outcome is not None
    return outcome


def _lay_down(client: Client, run: str, completed: Any) -> None:
    """After an interrupt: what has not begun is cancelled, what goes on is told to stop and waited for."""
    from distributed import wait

    futures = list(completed.futures)
    with contextlib.suppress(Exception):  # the scheduler may be what failed
        client.run(stop, run)
        wait(futures, timeout=PATIENCE)  # type: ignore[no-untyped-call]
        client.cancel(futures)  # type: ignore[no-untyped-call]
