"""What tests of many shards share: the same run here, on workers or as a command, and hooks that workers take."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle
import pytest
from distributed import Client, WorkerPlugin

from precompute.engine import dask_runner
from precompute.request import PrecomputeRequest
from precompute.run import precompute
from precompute.taps.target_spec import parse_target
from storage.store.store import Store
from storage.testing import TINY_CNN
from storage.views.policy import policy
from tests.conftest import HANGS, ROOT, Quiet, World, teacher_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from precompute.engine.tasks import Outcome, ShardTask

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers take hooks of this file without importing it

WISHES = ["activations,grid=8,codec=u8", "activations,grid=8,codec=f16"]
SAMPLES = 70  # two blocks
SLOW = partial(pytest.param, marks=pytest.mark.slow)


def run(world: World, store: Path, shards: list[str] | None = None, **more: Any) -> tuple[dict[str, Any], list[str]]:
    """Precompute under `deit`, two views; what it gives and what it says."""
    wishes = [wish for text in WISHES for wish in parse_target(text)]
    quiet = Quiet()
    wanted = PrecomputeRequest(
        shards=world.shards if shards is None else shards,
        teacher=teacher_of(world.weights, "cnn"),
        targets=wishes,
        policy=policy("deit", 32),
        policy_fields=frozenset({"line", "size"}),
        num_views=2,
        provider="cpu",
        **more,
    )
    dask_runner.held_session.clear()
    return asdict(precompute(Store.create(store), wanted, quiet)), quiet.lines


def command(world: World, store: Path, shards: list[str], *more: str) -> list[str]:
    """What `run` does, as a command in a process of its own."""
    return [sys.executable, "-m", "pipeline", *words(world, store, shards, *more)]


def words(world: World, store: Path, shards: list[str], *more: str) -> list[str]:
    """What `run` does, as the words of a command."""
    return [
        "precompute",
        "--teacher",
        TINY_CNN[0],
        "--weights",
        world.weights["cnn"],
        "--teacher-arg",
        "channels=[8,12,16,24]",
        "--teacher-arg",
        "stem_width=8",
        "--teacher-arg",
        "num_classes=3",
        "--input-size",
        "64",
        "--mean",
        "0.5",
        "--std",
        "0.5",
        "--teacher-name",
        "cnn",
        *(f"--target={wish}" for wish in WISHES),
        *(f"--shards={shard}" for shard in shards),
        "--store",
        str(store),
        "--view-policy",
        "deit",
        "--view-size",
        "32",
        "--num-views",
        "2",
        "--provider",
        "cpu",
        *more,
    ]


def start(words: list[str], **more: Any) -> subprocess.Popen[bytes]:
    """A command as the leader of a session of its own, so that its children can be told from others."""
    pipe = subprocess.PIPE
    return subprocess.Popen(words, cwd=ROOT, start_new_session=True, stdout=pipe, stderr=pipe, **more)


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
    process.communicate(timeout=HANGS)


def until(true: Callable[[], Any], what: str = "") -> Any:
    """What a call gives as soon as that is true."""
    limit = time.monotonic() + HANGS
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
        from precompute.engine.shard import run_task

        act, arguments = self.act, self.arguments

        def hooked(task: ShardTask, *rest: Any) -> Outcome:
            act(task, *arguments)
            return run_task(task, *rest)

        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("precompute.engine.dask_runner.run_task", hooked)
        self.patch.setattr("precompute.engine.dask_runner.BACKOFF", (0.01, 0.01, 0.01))

    def teardown(self, worker: Any) -> None:
        self.patch.undo()


@contextlib.contextmanager
def hooked(client: Client, act: Callable[..., None], *arguments: Any) -> Iterator[None]:
    client.register_plugin(Hook(act, *arguments))
    try:
        yield
    finally:
        client.unregister_worker_plugin("hook")


def address_of(client: Client) -> str:
    """Where a client's scheduler listens."""
    scheduler: Any = client.scheduler
    return str(scheduler.address)


def begun(path: str | Path) -> list[str]:
    """The lines that workers have added to a file: one for every beginning."""
    return Path(path).read_text().split() if Path(path).exists() else []
