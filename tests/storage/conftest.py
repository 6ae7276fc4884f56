"""Stores that several files of this room's tests start from."""

from __future__ import annotations

import copy
import shutil
import signal

import pytest

from storage.store.store import Store
from tests.conftest import HANGS
from tests.storage.helpers import class_folders, small_store

BUSY = 60  # seconds of this process's own time, whatever else the machine does


@pytest.fixture(scope="session")
def kept(tmp_path_factory):
    """A small store with targets `u8`, `f16` and `f32`, and their values; tests only read it."""
    folder = tmp_path_factory.mktemp("kept")
    small = small_store(folder / "store", folder / "data")
    values = {codec: small.add_target(codec, codec) for codec in ("u8", "f16", "f32")}
    return small, values


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("template")
    made = small_store(folder / "store", folder / "data", views=2, count=10)
    made.values = made.add_target("t")
    return made


@pytest.fixture
def small(template, tmp_path):
    """A small store that a test may change, with one target `t`."""
    made = copy.copy(template)
    made.store = Store.open(shutil.copytree(template.store.url, tmp_path / "store"))
    return made


@pytest.fixture
def never_hangs():
    def stop(*_: object) -> None:
        pytest.fail("it hangs")  # no Exception, so nobody takes it for a bad image

    clocks = {signal.SIGALRM: (signal.ITIMER_REAL, HANGS), signal.SIGPROF: (signal.ITIMER_PROF, BUSY)}
    before = {number: signal.signal(number, stop) for number in clocks}
    for clock, seconds in clocks.values():
        signal.setitimer(clock, seconds)
    yield
    for number, (clock, _) in clocks.items():
        signal.setitimer(clock, 0)
        signal.signal(number, before[number])


@pytest.fixture(scope="session")
def animals(tmp_path_factory):
    """Class folders of unequal size."""
    return class_folders(tmp_path_factory.mktemp("animals") / "animals", {"cat": 17, "dog": 10, "eel": 4})
