"""What several files of this room's tests start from."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import dask
import pytest
from distributed import Client

from precompute.engine import session as sessions
from precompute.engine.dask_client import local_cluster
from storage.testing import synthetic_shards
from tests.precompute.engine.clusters import SAMPLES, run
from tests.precompute.stores import Watched, contents

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np

    from tests.conftest import World


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[list[np.ndarray]], Any]], None]:
    """Every session from now on calls this with its outputs."""

    def install(act: Callable[[list[np.ndarray]], Any]) -> None:
        real = sessions.open_session
        monkeypatch.setattr("precompute.engine.dask_runner.open_session", lambda *args: Watched(real(*args), act))

    return install


@pytest.fixture(scope="session")
def deit(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Three small shards and the store that an undisturbed run in this process makes of them under `deit`."""
    folder = tmp_path_factory.mktemp("deit")
    shards = synthetic_shards(folder / "data", shards=3, samples=SAMPLES, seed=5)
    made = dataclasses.replace(world, folder=folder, shards=shards, store=folder / "store", targets={})
    result, _ = run(made, made.store)
    assert not result["failures"]
    return made


@pytest.fixture(scope="session")
def expected(deit: World) -> Any:
    return contents(deit.store)


@pytest.fixture
def mortal() -> Iterator[Client]:
    """Two workers of one test, which kills them: whether they come back in time is nobody else's matter.

    The scheduler gives a task up at the second death of its workers, not at the fourth: each costs the start of a new
    process, seconds.
    """
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 1}),
        local_cluster(2) as place,
        Client(place, set_as_default=False) as connected,
    ):
        yield connected
