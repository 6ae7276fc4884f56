"""What tests of precompute ask of the stores that it makes, and the runs and shards that make them."""

from __future__ import annotations

import hashlib
import io
import shutil
import tarfile
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from precompute.request import PrecomputeRequest
from precompute.run import precompute
from precompute.taps import target_spec
from storage.store.store import Store
from storage.store.verify import verify
from storage.testing import synthetic_shards
from storage.views.policy import policy
from tests.conftest import Quiet, World, teacher_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from precompute.engine import session as sessions
    from storage.store.markers import Task

CNN = ["activations,grid=8,codec=f32", "activations,grid=8,codec=u8", "logits"]
VIT = ["class_row", "class_token", "q,k,layers=last"]
F32 = CNN[:1]


class Watched:
    """A session of which a test sees every batch, and may change what it gives or raise."""

    def __init__(self, session: sessions.Session, act: Callable[[list[np.ndarray]], Any]) -> None:
        self._session, self._act, self.settings = session, act, session.settings

    def run(self, images: np.ndarray) -> list[np.ndarray]:
        outputs = self._session.run(images)
        self._act(outputs)
        return outputs


def seeded(world: World, folder: Path) -> Path:
    """A store that knows the world's teachers, bank, targets and graphs, and has no shard and no view yet."""
    for path in world.store.rglob("*"):
        name = path.relative_to(world.store).as_posix()
        if (path.name in ("zarr.json", "manifest.json") and name.count("/") in (0, 2)) or path.suffix == ".onnx":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / name)
    return folder


def snapshot(folder: Path) -> dict[str, tuple[str, int]]:
    """Path -> digest and time of change of every file, but for the card."""
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and path != folder / "README.md"
    }


def contents(folder: Path) -> dict[Task, dict[str, np.ndarray]]:
    """Task -> its arrays as they are kept, and what its marker says of invalid samples."""
    store = Store.open(folder)
    found = {}
    for task in store.done():
        marker = store.marker(task)
        found[task] = {name: array.read(0, array.shape[0]) for name, array in marker.arrays.items()}
        if task.kind == "bank":
            found[task]["invalid"] = np.array(marker.bank.invalid)
    return found


def assert_same(found: dict[Task, dict[str, np.ndarray]], expected: dict[Task, dict[str, np.ndarray]]) -> None:
    assert found.keys() == expected.keys()
    for task, arrays in expected.items():
        assert found[task].keys() == arrays.keys()
        for name, array in arrays.items():
            assert found[task][name].dtype == array.dtype, (task, name)
            assert np.array_equal(found[task][name], array), (task, name)


def of_cnn(everything: dict[Task, dict[str, np.ndarray]]) -> dict[Task, dict[str, np.ndarray]]:
    """The bank and the targets of one teacher."""
    return {task: arrays for task, arrays in everything.items() if task.kind == "bank" or task.id.startswith("cnn-")}


def failures(folder: Path, shards: list[str]) -> list[str]:
    return verify(Store.open(folder), shards, samples=0).failures


def attempts(folder: Path) -> set[str]:
    """The folders of attempts, counted or not."""
    return {str(path.relative_to(folder)) for kind in ("banks", "targets") for path in folder.glob(f"{kind}/*/*/*/*")}


def counted(folder: Path) -> set[str]:
    """The folders of attempts that markers name."""
    store = Store.open(folder)
    return {f"{task.folder}/{store.marker(task).record.attempt}" for task in store.done()}


def rewritten(source: str, to: Path, change: Callable[[int, str, bytes], bytes]) -> str:
    """A shard whose members' contents are changed: called with the sample's number, the ending and the bytes."""
    to.parent.mkdir(parents=True, exist_ok=True)
    keys: list[str] = []
    with tarfile.open(source) as old, tarfile.open(to, "w", format=tarfile.USTAR_FORMAT) as new:
        for member in old.getmembers():
            key, _, ending = member.name.partition(".")
            keys += [key] if key not in keys else []
            data = change(keys.index(key), ending, old.extractfile(member).read())  # type: ignore[union-attr]
            info = tarfile.TarInfo(member.name)
            info.size = len(data)
            new.addfile(info, io.BytesIO(data))
    return str(to)


def small_shard(folder: Path, samples: int = 10, **more: Any) -> list[str]:
    return synthetic_shards(folder, 1, samples, **more)


def told(store: Path, world: World, kind: str, wishes: list[str]) -> tuple[dict[str, Any], list[str]]:
    """As `run_precompute`, and what was said."""
    quiet = Quiet()
    parsed = [wish for text in wishes for wish in target_spec.parse_target(text)]
    wanted = PrecomputeRequest(
        shards=world.shards,
        teacher=teacher_of(world.weights, kind),
        targets=parsed,
        policy=policy("light", 32),
        policy_fields=frozenset({"line"}),
        provider="cpu",
    )
    return asdict(precompute(Store.create(store), wanted, quiet)), quiet.lines
