"""Dask workers: started on this machine, or those of a scheduler that runs already; what they are asked at first."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

from storage.errors import UserError, first_line, setting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from distributed import Client, LocalCluster

WORKER_TIMEOUT = 300.0  # seconds to wait for a first worker, and for one to come back once all are gone
_NEVER = 10**9  # seconds


def versions() -> dict[str, str]:
    """Runs on every worker: what has to agree between machines."""
    from importlib.metadata import version

    from storage.views.render import renderer

    return {"teacher-store": version("teacher-store"), **renderer()}


@contextlib.contextmanager
def local_cluster(count: int | None) -> Iterator[LocalCluster]:
    """A scheduler in this process and `count` worker processes of one thread each.

    A process that dies is replaced by its nanny. Dask would close a nanny whose worker is away at the moment that
    `distributed.deploy.lost-worker-timeout` (15 s) has passed since an earlier death, and the worker would never come
    back; so this never happens here.
    """
    import dask.config
    from distributed import LocalCluster

    settings = {"threads_per_worker": 1, "processes": True, "dashboard_address": "127.0.0.1:0"}
    with (
        dask.config.set({"distributed.deploy.lost-worker-timeout": _NEVER}),
        LocalCluster(n_workers=count, silence_logs=logging.CRITICAL, **settings) as cluster,  # type: ignore[no-untyped-call]
    ):
        yield cluster


@contextlib.contextmanager
def workers(
    count: int | None, address: str | None, say: Callable[[str], None], timeout: float = WORKER_TIMEOUT
) -> Iterator[Client]:
    """A client of `count` worker processes on this machine, or of the scheduler at an address.

    Args:
        count: how many to start here; None where there is an address.
        address: of a running scheduler.
        say: called with progress lines.
        timeout: seconds to wait for a first worker. How long the scheduler may take to answer is dask's own setting,
            `distributed.comm.timeouts.connect`.

    Raises:
        UserError: no scheduler answers at this address, it has no workers in time, or they cannot import this package.
    """
    from distributed import Client
    from distributed.comm.addressing import get_address_host_port
    from distributed.utils import silence_logging_cmgr

    cluster: Any = local_cluster(count) if address is None else contextlib.nullcontext(address)
    where = setting("workers", count) if address is None else setting("dask", address)
    # What dask logs is for its developers: whatever it means for the run is said in the run's own words.
    with silence_logging_cmgr(logging.CRITICAL), cluster as place:
        try:
            if address is not None:
                get_address_host_port(address)  # a client that is given nonsense is never closed
            # Not the default one: whoever calls this from Python computes dask collections of their own where they did.
            client = Client(place, set_as_default=False)  # type: ignore[no-untyped-call]
        except (OSError, TimeoutError, ValueError) as error:
            message = f"no scheduler answers at this address ({first_line(error)})"
            hint = "Start one with `dask scheduler`, and workers with `dask worker ADDRESS`."
            raise UserError(message, setting=where, hint=hint) from None
        with client:
            if address is None:
                _shield(client)
            _wait_for_one(client, address, where, say, timeout)
            _check_workers(client, where, say)
            yield client


def _shield(client: Client) -> None:
    """Interrupts that reach all processes of a terminal are for this one alone: it tells the workers to stop."""
    import signal

    from distributed import WorkerPlugin

    class Shield(WorkerPlugin):
        def setup(self, worker: Any) -> None:  # noqa: ARG002 - distributed names it
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)

    client.register_plugin(Shield(), name="shield")


def _wait_for_one(client: Client, address: str | None, where: str, say: Callable[[str], None], timeout: float) -> None:
    """Until there is a worker; a batch system may start them late."""
    hint = f"Start some: dask worker {address}" if address else "Is the machine out of memory?"
    if not processes(client):
        say(f"{where}: no worker yet; waiting up to {timeout:g} s for the first. {hint}")
    with connected():
        try:
            client.wait_for_workers(1, timeout=timeout)
        except TimeoutError:
            hint = f"{hint}\n  If workers take longer to start: {setting('worker_timeout', 'SECONDS')}"
            raise UserError(f"there are no workers after {timeout:g} s", setting=where, hint=hint) from None


LOST = "the connection to the scheduler was lost; run the same command again to resume"


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Whatever asks the scheduler may be the first to meet a closed connection; UserError where it is."""
    from distributed.client import ClosedClientError

    try:
        yield
    except (OSError, ClosedClientError):
        raise UserError(LOST) from None


def processes(client: Client) -> int:
    """How many workers the scheduler has now."""
    with connected():
        return len(client.nthreads())  # type: ignore[no-untyped-call]


def _check_workers(client: Client, where: str, say: Callable[[str], None]) -> None:
    """Compare the workers' versions with ours, and say how many there are."""
    try:
        theirs: dict[str, Any] = client.run(versions)
    except Exception as error:  # whatever importing raises there
        message = f"the workers cannot import this package ({first_line(error, kind=True)})"
        hint = "Install the same version of teacher-store there."
        raise UserError(message, setting=where, hint=hint) from None
    own = versions()
    for worker, packages in theirs.items():
        for name, version in sorted(packages.items() - own.items()):
            say(f"worker {worker} has {name} {version}, this machine {own.get(name)}; pixels may differ")
    say(f"{len(theirs)} worker(s); dashboard: {client.dashboard_link}")
