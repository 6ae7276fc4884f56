"""Precompute as a whole: complete once, adding touches nothing, and nothing that goes wrong is kept."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from precompute import export, targets
from precompute import session as sessions
from precompute.run import Wanted, precompute
from precompute.taps import Tap
from storage import codecs
from storage.banks import read_views
from storage.errors import IdentityError, UserError
from storage.markers import Task
from storage.policies import policy
from storage.shards import read_samples
from storage.store import Store
from storage.testing import TINY_CNN, FaultyObjects, synthetic_shards
from storage.verify import verify
from storage.views import BadImage, decode, render
from tests.conftest import Quiet, World, run_precompute, teacher_of, write_teacher

REPOSITORY = Path(__file__).parents[2]
CNN = ["activations,grid=8,codec=f32", "activations,grid=8,codec=u8", "logits"]
VIT = ["class_row", "class_token", "q,k,layers=last"]
F32 = CNN[:1]


# ---------------------------------------------------------------------------------------------- helpers


class Watched:
    """A session of which a test sees every batch, and may change what it gives or raise."""

    def __init__(self, session: sessions.Session, act: Callable[[list[np.ndarray]], Any]) -> None:
        self._session, self._act, self.settings = session, act, session.settings

    def run(self, images: np.ndarray) -> list[np.ndarray]:
        outputs = self._session.run(images)
        self._act(outputs)
        return outputs


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[list[np.ndarray]], Any]], None]:
    """Every session from now on calls this with its outputs."""

    def install(act: Callable[[list[np.ndarray]], Any]) -> None:
        real = sessions.open_session
        monkeypatch.setattr("precompute.cluster.open_session", lambda *args: Watched(real(*args), act))

    return install


def fail_after(blocks: int) -> Callable[[list[np.ndarray]], None]:
    left = iter(range(blocks))

    def act(outputs: list[np.ndarray]) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    return act


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
            found[task]["invalid"] = np.array(sorted(marker.invalid))
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
    return {f"{task.folder}/{store.marker(task).content['attempt']}" for task in store.done()}


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


def flipped_in_place(path: str, sample: int, ending: str) -> None:
    """Change one bit in the middle of a member, with the tar's size and headers as they were."""
    with tarfile.open(path) as tar:
        member = [m for m in tar.getmembers() if m.name.endswith(f".{ending}")][sample]
    with Path(path).open("r+b") as file:
        file.seek(member.offset_data + member.size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def small_shard(folder: Path, samples: int = 10, **more: Any) -> list[str]:
    return synthetic_shards(folder, 1, samples, **more)


def told(store: Path, world: World, kind: str, wishes: list[str]) -> tuple[dict[str, Any], list[str]]:
    """As `run_precompute`, and what was said."""
    quiet = Quiet()
    parsed = [wish for text in wishes for wish in targets.parse(text)]
    wanted = Wanted(
        world.shards, teacher_of(world.weights, kind), parsed, policy("light", 32), frozenset({"line"}), None,
        provider="cpu",
    )  # fmt: skip
    return precompute(Store.create(store), wanted, quiet), quiet.lines


def bank_marker(folder: Path, shard: str | None = None, view: int = 0) -> Path:
    tasks = [task for task in Store.open(folder).done() if task.kind == "bank" and task.view == view]
    return folder / "done" / min(task for task in tasks if shard in (None, task.shard)).name


# ---------------------------------------------------------------------------------------------- once


def test_the_same_command_again_writes_nothing_and_says_so(world: World, tmp_path: Path) -> None:
    place = world.copy(tmp_path / "store")
    before = snapshot(place)
    for kind, wishes in (("cnn", CNN), ("vit", VIT)):
        result, lines = told(place, world, kind, wishes)
        assert (result["written"], result["view_images"], result["views"]) == (0, 0, 2)
        assert any(line.endswith("2 shard(s)") and kind in line for line in lines)
        assert "all of it was complete already" in lines
    assert snapshot(place) == before


def test_contract_11_views_grow_by_those_that_are_missing_alone(world: World, tmp_path: Path) -> None:
    place = world.copy(tmp_path / "store")
    before, done = snapshot(place), Store.open(place).done()
    result = run_precompute(place, world.shards, teacher_of(world.weights, "cnn"), CNN, views=3)
    assert (result["written"], result["view_images"]) == (2 * len(CNN), 300)
    after = snapshot(place)
    assert {name: after[name] for name in before} == before
    added = Store.open(place).done() - done
    assert {(task.kind, task.view) for task in added} == {("bank", 2), ("target", 2)}
    assert len(added) == 2 * (len(CNN) + 1)
    assert not failures(place, world.shards)


def test_contract_11_a_target_of_a_new_tap_touches_nothing_that_is_there(world: World, tmp_path: Path) -> None:
    place = world.copy(tmp_path / "store")
    before, done = snapshot(place), Store.open(place).done()
    result, _ = told(place, world, "cnn", ["activations,layers=last,grid=2,codec=f16"])
    after = snapshot(place)
    assert {name: after[name] for name in before} == before
    assert {(task.kind, task.id) for task in Store.open(place).done() - done} == {("target", result["targets"][0])}
    assert not failures(place, [])


def test_contract_11_a_teacher_that_is_added_sees_the_views_that_are_there(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = seeded(world, tmp_path / "store")
    run_precompute(place, world.shards, teacher_of(world.weights, "cnn"), F32)
    before = snapshot(place)
    monkeypatch.setattr("precompute.stages.draw", None)  # views are replayed, never drawn again
    wanted = {"given": frozenset(), "policy": policy("light", 224, 99), "views": None}
    result = run_precompute(place, world.shards, teacher_of(world.weights, "vit"), VIT, **wanted)
    assert (result["bank"], result["views"]) == (next(iter(Store.open(world.store).banks())), 2)
    after = snapshot(place)
    assert {name: after[name] for name in before} == before
    mine, theirs = contents(place), contents(world.store)
    assert_same(mine, {task: theirs[task] for task in mine})


def test_contract_5_a_teacher_that_would_see_other_pixels_is_refused(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = seeded(world, tmp_path / "store")
    run_precompute(place, world.shards, teacher_of(world.weights, "cnn"), F32)
    before = snapshot(place)
    monkeypatch.setattr("storage.banks.render", lambda image, view, size: render(image, view, size) ^ 1)
    with pytest.raises(UserError, match=r"view 0, key shard-000000-00000: signature of the view's pixels"):
        run_precompute(place, world.shards, teacher_of(world.weights, "vit"), VIT)
    assert snapshot(place) == before, "the attempt is gone too"


# ---------------------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("name", ["activations f32", "activations u8", "logits", "class_row", "class_token", "q", "k"])
def test_contract_1_what_is_stored_is_what_the_live_teacher_gives_on_the_views_of_the_bank(
    world: World, name: str
) -> None:
    store = Store.open(world.store)
    manifest = store.target(world.targets[name])
    wish, codec = manifest["identity"], manifest["identity"]["codec"]
    kind = "cnn" if name.startswith(("act", "log")) else "vit"
    tap = Tap(wish["tap"], tuple(wish["layers"]) if wish["layers"] else None, wish["grid"])
    module = export.live_teacher(teacher_of(world.weights, kind), [tap], 32)
    url, view = world.shards[1], 1
    index = store.require(url, store.shard_ids())
    bank = store.marker(Task("bank", wish["bank"], index.id, view))
    samples = read_samples(url, index, range(50, 90))
    views = read_views(bank, 50, 90)
    pixels = [views.replay(i, sample, sample.image, 32, url) for i, sample in enumerate(samples)]
    with torch.no_grad():
        live = module(torch.from_numpy(np.stack(pixels)))[0].numpy()
    arrays = {
        key: a.read(50, 90) for key, a in store.marker(Task("target", manifest["id"], index.id, view)).arrays.items()
    }
    error = np.abs(codecs.Codec.of(manifest).decode(arrays) - live)
    allowed = 1e-4 * np.abs(live).max()
    if codec == "u8":
        allowed = allowed + arrays["scale"][..., :1, None].astype(np.float32) / 2
    if codec == "f16":
        allowed = allowed + 2.0**-11 * np.abs(live)
    assert (error <= allowed).all()
    assert live.std(0).max() > 1e-3, "targets that are the same for all samples would prove little"


def test_contract_3_another_process_with_the_shards_in_another_order_makes_the_same_store(
    world: World, tmp_path: Path
) -> None:
    place = tmp_path / "store"
    command = [
        sys.executable, "-m", "pipeline", "precompute", "--teacher", TINY_CNN[0], "--weights", world.weights["cnn"],
        "--teacher-arg", "channels=[8,12,16,24]", "--teacher-arg", "stem_width=8", "--teacher-arg", "num_classes=3",
        "--input-size", "64", "--mean", "0.5", "--std", "0.5", "--as", "cnn", *(f"--target={wish}" for wish in CNN),
        "--shards", world.shards[1], "--shards", world.shards[0], "--store", str(place), "--view-policy", "light",
        "--view-size", "32", "--view-count", "2", "--provider", "cpu", "--json",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    child = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, timeout=120, check=False)
    assert child.returncode == 0, child.stderr.decode()
    assert json.loads(child.stdout)["written"] == 2 * 2 * len(CNN)
    graphs = [[graph.name for graph in folder.glob("teachers/cnn/graphs/*")] for folder in (place, world.store)]
    assert len(graphs[0]) == 1
    assert graphs[0] == graphs[1], "the same graph from another process, checked on other images"
    assert_same(contents(place), of_cnn(contents(world.store)))


# ---------------------------------------------------------------------------------------------- identity


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"weights": "other"}, "weights sha256"), ({"mean": (0.4,)}, "mean"), ({"input_size": 96}, "input size"),
     ({"arguments": {**TINY_CNN[1], "num_classes": 3, "drop_rate": 0.1}}, "arguments")],
)  # fmt: skip
def test_contract_5_another_teacher_under_a_recorded_name_is_refused_and_changes_nothing(
    world: World, tmp_path: Path, changes: dict[str, Any], field: str
) -> None:
    place = world.copy(tmp_path / "store")
    before = snapshot(place)
    if "weights" in changes:
        changes = {"weights": write_teacher(tmp_path / "other.safetensors", TINY_CNN, seed=5)}
    other = teacher_of(world.weights, "cnn", **changes)
    with pytest.raises(IdentityError) as caught:
        run_precompute(place, world.shards, other, CNN)
    recorded = teacher_of(world.weights, "cnn")
    assert (caught.value.field, caught.value.expected, caught.value.found) == (
        field, recorded.identity[field], other.identity[field],
    )  # fmt: skip
    assert "--as cnn-2" in str(caught.value)
    assert snapshot(place) == before


def test_contract_5_a_shard_that_changed_in_its_middle_after_indexing_is_refused(world: World, tmp_path: Path) -> None:
    for sample, ending, field in ((100, "png", "image digest"), (100, "cls", "label")):
        place = world.copy(tmp_path / f"store {ending}")
        shutil.copytree(Path(world.shards[0]).parent, tmp_path / ending)
        shard = str(tmp_path / ending / Path(world.shards[0]).name)
        flipped_in_place(shard, sample, ending)
        before = snapshot(place)
        with pytest.raises(UserError, match=f"key shard-000000-00100: {field}|{field} of key shard-000000-00100"):
            run_precompute(place, [shard], teacher_of(world.weights, "cnn"), CNN, views=3)
        assert snapshot(place) == before


def test_a_shard_with_another_first_image_is_another_shard(world: World, tmp_path: Path) -> None:
    place = world.copy(tmp_path / "store")
    before = snapshot(place)
    donor = synthetic_shards(tmp_path / "donor", 1, 1, seed=9)[0]
    with tarfile.open(donor) as tar:
        member = next(m for m in tar.getmembers() if m.name.endswith(".png"))
        image = tar.extractfile(member).read()  # type: ignore[union-attr]
    shard = rewritten(
        world.shards[0], tmp_path / "data" / Path(world.shards[0]).name,
        lambda number, ending, data: image if number == 0 and ending == "png" else data,
    )  # fmt: skip
    result = run_precompute(place, [shard], teacher_of(world.weights, "cnn"), F32)
    assert result["shards"][0] not in Store.open(world.store).shard_ids()
    after = snapshot(place)
    assert {name: after[name] for name in before} == before
    assert not failures(place, [shard, world.shards[1]])


def test_the_same_shard_given_twice_is_refused(world: World, tmp_path: Path) -> None:
    twin = shutil.copy(world.shards[0], tmp_path)
    place = world.copy(tmp_path / "store")
    before = snapshot(place)
    with pytest.raises(UserError, match=r"holds the same samples as .*; give each shard once"):
        run_precompute(place, [world.shards[0], str(twin)], teacher_of(world.weights, "cnn"), CNN)
    assert snapshot(place) == before


@pytest.mark.parametrize(("line", "count"), [("none", 2), ("eval", 4)])
def test_more_than_one_view_of_a_policy_without_chance_is_refused(
    world: World, tmp_path: Path, line: str, count: int
) -> None:
    wanted = {"policy": policy(line, 32), "views": count}
    with pytest.raises(UserError, match=f"--view-count {count}: .* leaves nothing to chance"):
        run_precompute(seeded(world, tmp_path / "s"), world.shards, teacher_of(world.weights, "cnn"), CNN, **wanted)


# ---------------------------------------------------------------------------------------------- stopped half way


@pytest.mark.parametrize("blocks", [0, 1, 4, 7, 11])
def test_contract_3_a_run_that_stops_leaves_whole_shards_and_goes_on_to_the_same_store(
    world: World, tmp_path: Path, watch: Any, blocks: int
) -> None:
    place = seeded(world, tmp_path / "store")
    watch(fail_after(blocks))
    with pytest.raises(KeyboardInterrupt):
        run_precompute(place, world.shards, teacher_of(world.weights, "cnn"), CNN)
    done = Store.open(place).done()
    assert len({task.shard for task in done}) == blocks // 6, "3 blocks of 2 views make a shard"
    assert len(done) == blocks // 6 * 2 * (len(CNN) + 1)
    assert attempts(place) == counted(place)
    watch(lambda outputs: None)
    result = run_precompute(place, world.shards, teacher_of(world.weights, "cnn"), CNN)
    assert result["written"] == 2 * len(CNN) * (2 - blocks // 6)
    assert_same(contents(place), of_cnn(contents(world.store)))
    assert not failures(place, world.shards)


CHILD = """
import os, signal, sys
from precompute.engine import run_task
from precompute.tasks import Output, ShardTask
from precompute.session import open_session
from storage.store import Store

place, target, kill_after, *shards = sys.argv[1:]
store = Store.open(place)
manifest = store.target(target)
session = open_session(store.graph(manifest["teacher"], manifest["graph"]), "cpu", 1)
real, left = session.run, int(kill_after)

def run(images):
    global left
    left -= 1
    if left == -1:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(images)

session.run = run
of_it = manifest["identity"]["bank"], manifest["teacher"], manifest["graph"], (Output.of(manifest),)
for url in shards:
    run_task(ShardTask(store, url, *of_it, views=2), lambda: session, 1)
assert "torch" not in sys.modules, "a worker that only runs a graph needs no torch"
"""


def child(place: Path, target: str, kill_after: int, shards: list[str]) -> subprocess.Popen[bytes]:
    """A process of its own that makes a target of shards; it kills itself after so many blocks."""
    command = [sys.executable, "-c", CHILD, str(place), target, str(kill_after), *shards]
    return subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE)


def test_contract_3_and_6_after_sigkill_two_processes_at_once_complete_the_store(world: World, tmp_path: Path) -> None:
    place, target = seeded(world, tmp_path / "store"), world.targets["activations f32"]
    killed = child(place, target, 8, world.shards)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    done = Store.open(place).done()
    assert {(task.kind, task.view) for task in done} == {("bank", 0), ("bank", 1), ("target", 0), ("target", 1)}
    assert len({task.shard for task in done}) == 1
    assert attempts(place) > counted(place), "nobody could remove what the killed run had begun"
    both = [child(place, target, -1, world.shards), child(place, target, -1, world.shards[::-1])]
    for process in both:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err.decode()
    mine, theirs = contents(place), contents(world.store)
    assert_same(mine, {t: a for t, a in theirs.items() if t.kind == "bank" or t.id == target})
    assert not failures(place, world.shards)


def test_contract_6_two_runs_at_once_make_one_store(world: World, tmp_path: Path, watch: Any) -> None:
    place = seeded(world, tmp_path / "store")
    meet = threading.Barrier(2, timeout=30)
    watch(lambda outputs: meet.wait())  # both render and run every block at the same time, and mark at the same time
    raised: list[BaseException] = []
    written: list[int] = []

    def one() -> None:
        try:
            written.append(run_precompute(place, world.shards, teacher_of(world.weights, "cnn"), CNN)["written"])
        except BaseException as error:
            meet.abort()
            raised.append(error)

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not raised
    assert written == [12, 12], "both did all the work, or this proves nothing"
    assert attempts(place) == counted(place), "who comes second takes away what it wrote"
    assert_same(contents(place), of_cnn(contents(world.store)))
    assert not failures(place, world.shards)


def test_contract_6_of_two_runs_that_drew_other_views_the_second_is_refused(
    world: World, tmp_path: Path, watch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = seeded(world, tmp_path / "store")
    shard = small_shard(tmp_path / "data")

    def meanwhile(outputs: list[np.ndarray]) -> None:
        watch(lambda outputs: None)
        with monkeypatch.context() as other:
            other.setattr("precompute.stages.render", lambda image, view, side: np.full((side, side, 3), 7, np.uint8))
            run_precompute(place, shard, teacher_of(world.weights, "cnn"), F32)

    watch(meanwhile)
    with pytest.raises(UserError, match="checksums of the bank's parameters and signatures"):
        run_precompute(place, shard, teacher_of(world.weights, "cnn"), F32)
    assert attempts(place) == counted(place)
    assert not failures(place, [])


# ---------------------------------------------------------------------------------------------- damaged markers


def remove(path: Path) -> None:
    path.unlink()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def another(path: Path) -> None:
    shutil.copy(next(other for other in path.parent.iterdir() if other.name < path.name), path)


@pytest.mark.parametrize("damage", [remove, flip, cut, another])
def test_contract_4_a_target_without_its_marker_is_made_again_alone(
    world: World, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    place = world.copy(tmp_path / "store")
    task = max(t for t in Store.open(place).done() if t.id == world.targets["activations u8"])
    before = snapshot(place)
    damage(place / "done" / task.name)
    result = run_precompute(place, world.shards, teacher_of(world.weights, "cnn"), CNN)
    assert (result["written"], result["view_images"]) == (1, 150)
    after = snapshot(place)
    changed = {name for name in before if after.get(name) != before[name]}
    assert changed == {f"done/{task.name}"}
    assert_same(contents(place), contents(world.store))
    assert not failures(place, [])


@pytest.mark.parametrize("damage", [remove, flip, cut, another])
def test_a_bank_without_its_marker_is_made_again_and_targets_of_the_same_views_stay_good(
    world: World, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    place = world.copy(tmp_path / "store")
    damage(bank_marker(place, view=1))
    assert failures(place, [])
    result = run_precompute(place, world.shards, teacher_of(world.weights, "cnn"), CNN)
    assert (result["written"], result["view_images"]) == (len(CNN), 150), "this shard and view alone"
    assert not failures(place, world.shards), "the other teacher saw the same views"
    result = run_precompute(place, world.shards, teacher_of(world.weights, "vit"), VIT)
    assert (result["written"], result["view_images"]) == (0, 0)
    assert_same(contents(place), contents(world.store))


def test_targets_of_other_views_than_the_bank_has_are_named_and_made_again(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, shards = world.copy(tmp_path / "store"), world.shards[:1]
    for view in (0, 1):
        bank_marker(place, view=view).unlink()
    with monkeypatch.context() as other:
        for module in ("precompute.stages", "storage.banks"):
            other.setattr(f"{module}.render", lambda image, view, size: 255 - render(image, view, size))
        result = run_precompute(place, shards, teacher_of(world.weights, "cnn"), CNN)
        assert result["written"] == 2 * len(CNN)
        named = failures(place, [])
        assert len(named) == 2 * 4, "every view of the other teacher's targets over this shard"
        assert all("vit-" in line and "were made from another bank" in line for line in named)
        result = run_precompute(place, shards, teacher_of(world.weights, "vit"), VIT)
        assert result["written"] == 2 * 4
        assert not failures(place, shards)
    mine, theirs = contents(place), contents(world.store)
    changed = {task for task in mine if any(not np.array_equal(mine[task][n], theirs[task][n]) for n in mine[task])}
    assert changed == {task for task in mine if task.shard == min(t.shard for t in mine)}


def test_contract_5_views_that_are_added_are_rendered_as_those_that_are_there(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = world.copy(tmp_path / "store")
    before = snapshot(place)
    for module in ("precompute.stages", "storage.banks"):
        monkeypatch.setattr(f"{module}.render", lambda image, view, size: render(image, view, size) ^ 1)
    with pytest.raises(UserError, match="signature of the view's pixels"):
        run_precompute(place, world.shards, teacher_of(world.weights, "cnn"), CNN, views=3)
    assert snapshot(place) == before


def test_views_of_the_bank_that_are_damaged_stop_a_run_and_are_named(world: World, tmp_path: Path) -> None:
    place = seeded(world, tmp_path / "store")
    shard = small_shard(tmp_path / "data")
    run_precompute(place, shard, teacher_of(world.weights, "cnn"), F32)
    chunk = next(place.glob("banks/*/*/0/*/parameters/c/0/0"))
    flip(chunk)
    with pytest.raises(UserError, match=str(chunk.relative_to(place))):
        run_precompute(place, shard, teacher_of(world.weights, "vit"), VIT)


# ---------------------------------------------------------------------------------------------- bad images, bad values


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_teacher_that_gives_no_number_fails_by_name_and_nothing_is_marked(
    world: World, tmp_path: Path, watch: Any, value: float
) -> None:
    place = seeded(world, tmp_path / "store")
    batches = iter(range(100))

    def spoil(outputs: list[np.ndarray]) -> None:
        if next(batches) in (3, 7):  # second block, second view, of each shard: the first fails at its second block
            outputs[0][5, 3, 2, 1] = value

    watch(spoil)
    with pytest.raises(
        UserError, match=r"key 'shard-000000-00069', view 1: the teacher 'cnn' gives .* not finite"
    ) as e:
        run_precompute(place, world.shards, teacher_of(world.weights, "cnn"), CNN)
    assert world.shards[0] in str(e.value)
    assert not Store.open(place).done()
    assert not attempts(place)


@pytest.fixture
def corrupt(world: World, tmp_path: Path) -> str:
    """A shard of 150 samples with two images that cannot be decoded: numbers 3 and 80."""
    damage = {3: lambda data: data[: len(data) // 2], 80: lambda data: b"not an image"}
    return rewritten(
        world.shards[0], tmp_path / "corrupt" / "corrupt-000000.tar",
        lambda number, ending, data: damage[number](data) if ending == "png" and number in damage else data,
    )  # fmt: skip


def test_an_image_that_cannot_be_decoded_fails_its_shard_by_key(world: World, tmp_path: Path, corrupt: str) -> None:
    place = seeded(world, tmp_path / "store")
    with pytest.raises(UserError, match=r"corrupt-000000.tar: key 'shard-000000-00003'.*\n.*--bad-images skip"):
        run_precompute(place, [world.shards[1], corrupt], teacher_of(world.weights, "cnn"), CNN)
    store = Store.open(place)
    assert {task.shard for task in store.done()} == {store.require(world.shards[1], store.shard_ids()).id}
    assert attempts(place) == counted(place)


def test_an_image_that_cannot_be_decoded_in_the_first_shard_stops_no_other(
    world: World, tmp_path: Path, corrupt: str
) -> None:
    result, _ = told(tmp_path / "store", dataclasses.replace(world, shards=[corrupt, world.shards[1]]), "cnn", F32)
    assert [failure["shard"] for failure in result["failures"]] == [corrupt]
    assert not failures(tmp_path / "store", world.shards[1:])
    assert len(result["shards"]) == 1


def test_images_that_cannot_be_decoded_are_left_out_when_asked_for(world: World, tmp_path: Path, corrupt: str) -> None:
    place = seeded(world, tmp_path / "store")
    result = run_precompute(place, [corrupt], teacher_of(world.weights, "cnn"), CNN, bad_images="skip")
    assert result["invalid"] == [f"{corrupt}: shard-000000-00003", f"{corrupt}: shard-000000-00080"]
    store = Store.open(place)
    for view in (0, 1):
        marker = store.marker(Task("bank", result["bank"], result["shards"][0], view))
        assert marker.invalid == {3, 80}
        views = read_views(marker, 0, 150)
        assert [i for i in range(150) if not views.view(i).valid] == [3, 80]
        assert [i for i in range(150) if not views.signatures[i]] == [3, 80]
    assert not failures(place, [corrupt])


def test_a_second_teacher_agrees_which_images_are_invalid(world: World, tmp_path: Path, corrupt: str) -> None:
    place = seeded(world, tmp_path / "store")
    run_precompute(place, [corrupt], teacher_of(world.weights, "cnn"), CNN, bad_images="skip")
    with pytest.raises(UserError, match="key 'shard-000000-00003'"):
        run_precompute(place, [corrupt], teacher_of(world.weights, "vit"), VIT)
    result = run_precompute(place, [corrupt], teacher_of(world.weights, "vit"), VIT, bad_images="skip")
    assert len(result["invalid"]) == 2
    assert not failures(place, [corrupt])


def test_contract_5_an_image_that_was_invalid_and_is_not_any_more_is_refused(
    world: World, tmp_path: Path, corrupt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = seeded(world, tmp_path / "store")
    run_precompute(place, [corrupt], teacher_of(world.weights, "cnn"), F32, bad_images="skip")

    def lenient(data: bytes) -> Image.Image:  # as a newer decoder may be
        try:
            return decode(data)
        except BadImage:
            return Image.new("RGB", (40, 32))

    monkeypatch.setattr("precompute.stages.decode", lenient)
    with pytest.raises(UserError, match="view 0, key shard-000000-00003: image: expected invalid, found valid"):
        run_precompute(place, [corrupt], teacher_of(world.weights, "vit"), VIT, bad_images="skip")


# ---------------------------------------------------------------------------------------------- faults


class Faults:
    """One tiny shard, and the whole of precompute over it with nothing exported twice."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world, self.folder = world, folder
        self.shards = small_shard(folder / "data", 10)
        self.count = 0

    def fresh(self) -> Path:
        self.count += 1
        return self.folder / f"store-{self.count}"

    def run(self, place: Path, **fault: Any) -> FaultyObjects:
        objects = FaultyObjects(place, **fault)
        store = Store.create(objects)
        run_precompute(store, self.shards, teacher_of(self.world.weights, "cnn"), CNN[1:], views=1)
        return objects


@pytest.fixture(scope="module")
def faults(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faults]:
    """Teachers, graphs and sessions are made once for all runs of these tests; everything else is as ever."""
    made: dict[Any, Any] = {}

    def once(what: Callable[..., Any], key: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if (what, key(*args)) not in made:
                made[what, key(*args)] = what(*args)
            return made[what, key(*args)]

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "export", once(export.export, lambda teacher, taps, *rest: tuple(taps)))
        patch.setattr(targets, "load", once(targets.load, lambda teacher: teacher.id))
        patch.setattr(os, "fsync", lambda descriptor: None)  # no power is lost here, and it takes most of the time
        patch.setattr("precompute.cluster.open_session", once(sessions.open_session, lambda graph, *rest: graph))
        patch.setattr("precompute.cluster.BACKOFF", (0.0, 0.0))
        yield Faults(world, tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def undisturbed(faults: Faults) -> dict[Task, dict[str, np.ndarray]]:
    place = faults.fresh()
    faults.run(place)
    assert not failures(place, faults.shards)
    return contents(place)


SWEEP = [
    ("write", "EIO", 1), ("write", "short", 3), ("write", "ENOSPC", 3), ("write", "lost", 3), ("link", "EIO", 1),
    ("link", "lost", 1), ("sync", "EIO", 5), ("sync", "lost", 11), ("read", "EIO", 3),
]  # fmt: skip


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
            unforeseen += [str(error)] * ("this should not happen" in str(error))
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


def test_scales_that_f16_cannot_hold_are_kept_in_f32(world: World, tmp_path: Path, watch: Any) -> None:
    def grow(outputs: list[np.ndarray]) -> None:
        for output in outputs:
            output *= np.float32(1e7)

    watch(grow)
    shard = world.shards[:1]
    run_precompute(
        tmp_path / "store", shard, teacher_of(world.weights, "cnn"), ["activations,grid=8,codec=u8"], views=1
    )
    store, original = Store.open(tmp_path / "store"), Store.open(world.store)
    (task,) = [t for t in store.done() if t.kind == "target"]
    arrays = store.marker(task).arrays
    assert arrays["scale"].dtype == np.float32
    exact = original.marker(Task("target", world.targets["activations f32"], task.shard, 0)).arrays["data"].read(0, 150)
    kept = {name: array.read(0, 150) for name, array in arrays.items()}
    error = np.abs(codecs.Codec("u8", exact.shape[1:], 2).decode(kept) - exact * 1e7)
    assert (error <= kept["scale"][..., :1, None] * 0.51 + 1e-4 * np.abs(exact * 1e7).max()).all()
    assert not failures(tmp_path / "store", shard)


def test_f32_scales_of_one_view_leave_the_others_in_f16(world: World, tmp_path: Path, watch: Any) -> None:
    teacher, wishes = teacher_of(world.weights, "cnn"), ["activations,grid=8,codec=u8"]
    small = small_shard(tmp_path / "data", 70)
    run_precompute(tmp_path / "store", small, teacher, wishes, views=1)
    watch(lambda outputs: [np.multiply(output, np.float32(1e7), out=output) for output in outputs])
    run_precompute(tmp_path / "store", small, teacher, wishes, views=2)
    store = Store.open(tmp_path / "store")
    kinds = {t.view: store.marker(t).arrays["scale"].dtype for t in store.done() if t.kind == "target"}
    assert kinds == {0: np.float16, 1: np.float32}
    assert not failures(tmp_path / "store", small)
