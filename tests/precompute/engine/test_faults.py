"""A fault of input or output anywhere, or a full disk, leaves a store that the same command completes."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from precompute import record_targets
from precompute.engine import session as sessions
from precompute.export import pytorch
from precompute.teachers import teacher as teachers
from storage.errors import UserError
from storage.objects.json_record import digest_of
from storage.store.store import Store
from storage.testing import FaultyObjectStore
from tests.conftest import World, run_precompute, teacher_of
from tests.precompute.stores import CNN, assert_same, contents, failures, small_shard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import numpy as np

    from storage.store.markers import Task


class Faults:
    """One tiny shard, and the whole of precompute over it with nothing exported twice."""

    def __init__(self, world: World, folder: Path) -> None:
        self.folder, self.teacher = folder, teacher_of(world.weights, "cnn")
        self.shards = small_shard(folder / "data", 10)
        self.count = 0

    def fresh(self) -> Path:
        self.count += 1
        return self.folder / f"store-{self.count}"

    def run(self, place: Path, **fault: Any) -> FaultyObjectStore:
        objects = FaultyObjectStore(place, **fault)
        store = Store.create(objects)
        run_precompute(store, self.shards, self.teacher, CNN[1:], num_views=1)
        return objects


@pytest.fixture(scope="module")
def faults(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faults]:
    """Teachers, graphs and sessions are made once for all runs of these tests; everything else is as ever."""
    made: dict[Any, Any] = {}

    def once(what: Callable[..., Any], key: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            if (what, key(*args)) not in made:
                made[what, key(*args)] = what(*args, **named)
            return made[what, key(*args)]

        return call

    def exported_once(teacher: Any, taps: Any, *rest: Any, file: Path, **named: Any) -> Any:
        """The same graph for the same taps, in whichever file."""
        kept = tmp_path_factory.getbasetemp() / f"{digest_of(repr(tuple(taps)))}.onnx"
        exported = once(export, lambda teacher, taps, *rest: tuple(taps))(teacher, taps, *rest, file=kept, **named)
        shutil.copy(kept, file)
        return exported

    export = pytorch.export
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pytorch, "export", exported_once)
        patch.setattr(record_targets, "load_teacher", once(teachers.load_teacher, lambda teacher: teacher.id))
        patch.setattr(os, "fsync", lambda descriptor: None)  # no power is lost here, and it takes most of the time
        patch.setattr(
            "precompute.engine.dask_runner.open_session", once(sessions.open_session, lambda graph, *rest: graph)
        )
        patch.setattr("precompute.engine.dask_runner.BACKOFF", (0.0, 0.0))
        yield Faults(world, tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def undisturbed(faults: Faults) -> dict[Task, dict[str, np.ndarray]]:
    place = faults.fresh()
    faults.run(place)
    assert not failures(place, faults.shards)
    return contents(place)


SWEEP = [
    ("write", "EIO", 1),
    ("write", "short", 3),
    ("write", "ENOSPC", 3),
    ("write", "lost", 3),
    ("link", "EIO", 1),
    ("link", "lost", 1),
    ("sync", "EIO", 5),
    ("sync", "lost", 11),
    ("read", "EIO", 3),
]


@pytest.mark.parametrize("forever", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize(("operation", "fault", "stride"), SWEEP, ids=[f"{o} {f}" for o, f, _ in SWEEP])
def test_contract_3_a_fault_anywhere_leaves_a_store_that_the_same_command_completes(
    faults: Faults, undisturbed: Any, operation: str, fault: str, stride: int, forever: bool
) -> None:
    total = faults.run(faults.fresh(), operation=operation).calls
    assert total >= 8
    failed, unforeseen = 0, []
    for number in range(0, total, stride):
        place = faults.fresh()
        try:
            faults.run(place, operation=operation, fail_at=number, fault=fault, forever=forever)
        except (UserError, OSError) as error:
            unforeseen += [str(error)] * ("internal error" in str(error))
            failed += 1
        faults.run(place)
        assert_same(contents(place), undisturbed)
        assert not failures(place, faults.shards), f"{operation} {number} {fault}"
    assert not unforeseen
    if forever or fault == "ENOSPC":  # a full disk is not waited for
        assert failed > total / stride / 2, "what goes on failing is seen"
    else:
        assert failed < total / stride / 3, "a task is tried again after a fault of input or output"


@pytest.mark.parametrize("number", [3, 9, 14])
def test_contract_3_a_full_disk_is_an_error_and_the_same_command_completes_later(
    faults: Faults, undisturbed: Any, number: int
) -> None:
    place = faults.fresh()
    with pytest.raises((UserError, OSError), match="No space left"):
        faults.run(place, operation="write", fail_at=number, fault="ENOSPC", forever=True)
    faults.run(place)
    assert_same(contents(place), undisturbed)
    assert not failures(place, faults.shards)
