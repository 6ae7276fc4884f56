"""Many shards: one after another here, or on dask workers. The markers in the store, not the scheduler, are the truth.

Workers are free of torch: they import this module, the engine and ONNX Runtime. A worker process runs one task at a
time with one session; the graph is read from the store once a process.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from dask.system import CPU_COUNT

from precompute.engine.dask_client import LOST, WORKER_TIMEOUT, connected, processes
from precompute.engine.session import Session, open_session
from precompute.engine.shard import run_task
from precompute.engine.tasks import Failure, Outcome, Outcomes, ReportProgress, ShardTask
from storage.errors import UserError, first_line, is_permanent, setting
from storage.memory import out_of_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from distributed import Client

    from storage.progress import Progress

T = TypeVar("T")

BACKOFF = (1.0, 4.0, 16.0)  # seconds before each new try after an input or output fault, give or take a half
SAID_AFTER = 10.0  # seconds without any worker before it is said; one that died usually comes back sooner
STOP_TIMEOUT = 60.0  # seconds that an interrupted run waits for its workers to finish the block that they are at


class _Stopped(BaseException):
    """The run was interrupted: no fault of a task."""


# ------------------------------------------------------------------------------------------------ in one process

_one_at_a_time = threading.Lock()
_stopped: set[str] = set()  # runs whose tasks are to lay down their work


held_session: dict[tuple[object, ...], Session] = {}  # the one session of this process


def _session(task: ShardTask, provider: str, threads: int) -> Session:
    key = (task.store.url, task.graph, provider, threads)
    if key not in held_session:
        held_session.clear()
        held_session[key] = open_session(task.store.graph(task.teacher, task.graph), provider, threads)
    return held_session[key]


def retry_io(call: Callable[[], T]) -> T:
    """What a call gives; after an input or output fault that may pass it is called again, some time later."""
    for pause in BACKOFF:
        try:
            return call()
        except OSError as error:
            if is_permanent(error):
                raise
            time.sleep(pause * random.uniform(0.5, 1.5))
    return call()


def attempt(task: ShardTask, provider: str, threads: int, report: ReportProgress) -> Outcome | Failure:
    """Run a task; input and output faults are tried again after a while, faults of the data are not."""
    session = functools.partial(_session, task, provider, threads)
    try:
        return retry_io(lambda: run_task(task, session, threads, report))
    except UserError as error:
        return Failure(shard=task.url, error=str(error), kind="data")
    except OSError as error:
        reason = f"{error.filename or 'input or output'}: {first_line(error)}"
        return Failure(shard=task.url, error=f"{task.url}: {reason}", kind="io")
    except Exception as error:
        reason = f"internal error: {first_line(error, kind=True)}"
        return Failure(shard=task.url, error=f"{task.url}: {reason}", kind="bug")


class _Tracker:
    """Adds up what the tasks report; shards that have not begun are taken to be as long as the others."""

    def __init__(self, progress: Progress, shards: int) -> None:
        self.progress, self.shards, self._lock = progress, shards, threading.Lock()
        self.done: dict[str, int] = {}
        self.todo: dict[str, int] = {}

    def __call__(self, url: str, done: int, todo: int) -> None:
        with self._lock:
            self.progress.advance(done - self.done.get(url, 0))
            self.done[url] = done
            if url not in self.todo:
                self.todo[url] = todo
                known = sum(self.todo.values())
                self.progress.expect(known + known * (self.shards - len(self.todo)) // len(self.todo))


def run_in_process(tasks: Iterator[ShardTask], count: int, provider: str, progress: Progress) -> Outcomes:
    """Url and outcome of one task after another, in this process.

    Each runs in a thread of its own: an interrupt, which comes to the main thread, tears nothing out of its hands. The
    task is told, and lays down its work after the block that it is at.
    """
    tracker, interrupted = _Tracker(progress, count), threading.Event()

    def report(url: str, done: int, todo: int) -> None:
        if interrupted.is_set():
            raise _Stopped
        tracker(url, done, todo)

    with ThreadPoolExecutor(1, "task") as thread:
        for task in tasks:
            future = thread.submit(attempt, task, provider, CPU_COUNT, functools.partial(report, task.url))
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

    with _one_at_a_time, contextlib.suppress(_Stopped):
        if run not in _stopped:
            return attempt(task, provider, threads or worker.state.nthreads, report)
    return None


def stop(run: str) -> None:
    """Runs on every worker: tasks of a run lay down their work after the block that they are at."""
    _stopped.add(run)


def run_on_cluster(
    client: Client,
    tasks: Iterator[ShardTask],
    count: int,
    provider: str,
    threads: int | None,
    *,
    progress: Progress,
    worker_timeout: float = WORKER_TIMEOUT,
) -> Outcomes:
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
        worker_timeout: seconds to wait for one to come back once all workers are gone.

    Raises:
        UserError: the scheduler is gone, or no worker came back in time.
    """
    from distributed import as_completed

    run, tracker = uuid.uuid4().hex[:8], _Tracker(progress, count)
    client.subscribe_topic(f"precompute-{run}", lambda event: tracker(*event[1]))  # type: ignore[no-untyped-call]
    running: dict[str, ShardTask] = {}  # by the future's key
    suspects: list[ShardTask] = []  # what the workers that died had; with several, only one of them may be to blame
    alone: set[str] = set()  # urls of suspects that were tried again, one at a time
    completed: Any = as_completed(loop=client.loop)  # type: ignore[no-untyped-call]

    def fill() -> None:
        # One for each process, which runs one at a time: a second one would wait there while another may be free.
        spare = max(1, processes(client)) - len(running)
        begun = list(itertools.islice(tasks, max(0, spare)))
        if not running and not begun and suspects:
            begun = [suspects.pop()]
            alone.add(begun[0].url)
        for task in begun:
            with connected():
                future: Any = client.submit(work, task, provider, threads, run, pure=False)
            running[future.key] = task
            completed.add(future)

    try:
        fill()
        for future in _as_they_come(client, completed, progress, worker_timeout):
            task = running.pop(future.key)
            outcome = _result(future, task.url)
            suspect = isinstance(outcome, Failure) and outcome.kind == "worker" and task.url not in alone
            if suspect:
                suspects.append(task)
            fill()
            if not suspect:
                yield task.url, outcome
    except BaseException:
        _cancel(client, run, completed)
        raise
    finally:
        with contextlib.suppress(Exception):
            client.unsubscribe_topic(f"precompute-{run}")  # type: ignore[no-untyped-call]


def _as_they_come(client: Client, completed: Any, progress: Progress, worker_timeout: float) -> Iterator[Any]:
    """Futures that are done, while there are any.

    Raises:
        UserError: the scheduler is gone, or has had no worker for `worker_timeout` seconds.
    """
    seen = checked = time.monotonic()
    said = False
    while completed.count():
        yield from completed.next_batch(block=False)
        now = time.monotonic()
        if now - checked > 1:
            checked = now
            if processes(client):
                seen, said = now, False
            elif now - seen > worker_timeout:
                longer = f"if workers take longer to start, with a longer {setting('worker_timeout', 'SECONDS')}"
                message = f"all workers are gone and none came back within {worker_timeout:g} s"
                raise UserError(message, hint=f"Run the same command again to resume; {longer}")
            elif not said and now - seen > SAID_AFTER:
                said = True
                progress.say(f"all workers are gone; waiting up to {worker_timeout:g} s for one to come back")
        time.sleep(0.005)


def _result(future: Any, url: str) -> Outcome | Failure:
    from distributed.scheduler import KilledWorker

    try:
        outcome: Outcome | Failure | None = future.result()
    except KilledWorker as error:
        died = f"the {error.allowed_failures + 1} workers that had it died, the last at {error.last_worker.address}"
        fewer, scheduler = setting("workers", "N"), setting("dask", "ADDRESS")
        hint = f"start fewer by {fewer}, or give those of {scheduler} more memory, and run the same command again"
        return Failure(shard=url, error=f"{url}: {died}: {out_of_memory(hint)}", kind="worker")
    except Exception as error:
        if future.cancelled():
            raise UserError(LOST) from None
        return Failure(shard=url, error=f"{url}: {first_line(error, kind=True)}", kind="worker")
    assert outcome is not None
    return outcome


def _cancel(client: Client, run: str, completed: Any) -> None:
    """After an interrupt: what has not begun is canceled, what goes on is told to stop and waited for."""
    from distributed import wait

    futures = list(completed.futures)
    with contextlib.suppress(Exception):  # the scheduler may be what failed
        if client.run(stop, run):  # there are workers to wait for
            wait(futures, timeout=STOP_TIMEOUT)  # type: ignore[no-untyped-call]
        client.cancel(futures)  # type: ignore[no-untyped-call]
