"""Arrays, store and card: readable by zarr alone, written once, counted by markers, and never a silent hole."""

from __future__ import annotations

import base64
import copy
import dataclasses
import json
import pickle
import re
import shutil
import struct
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import records
from storage.arrays import ArrayWriter, StoredArray, chunk_samples
from storage.banks import bank_policy, read_views
from storage.card import card
from storage.errors import DamageError, IdentityError, UserError, nearest
from storage.markers import Attempt, Task
from storage.objects import LocalObjects, open_objects
from storage.policies import OPERATIONS_VERSION, policy
from storage.shards import build_index, read_samples
from storage.store import Store
from storage.testing import FaultyObjects
from storage.views import View
from tests.storage.helpers import SmallStore, decode, sample, samples, small_store, write_tar

MIB = 1 << 20


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A small store with targets `u8`, `f16` and `f32`, and their values; tests only read it."""
    folder = tmp_path_factory.mktemp("kept")
    small = small_store(folder / "store", folder / "data")
    values = {codec: small.add_target(codec, codec) for codec in ("u8", "f16", "f32")}
    return small, values


@pytest.fixture(scope="module")
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


def files_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def decoded(store: Store, task: Task, codec: str) -> np.ndarray:
    arrays = store.marker(task).arrays
    return decode(codec, {name: array.read(0, array.shape[0]) for name, array in arrays.items()})


# ---------------------------------------------------------------------------------------------- chunks


@pytest.mark.parametrize(
    ("sample_bytes", "count", "expected"),
    [
        (20 * MIB, 100, 1),  # more than a chunk may have: still one sample
        (16 * MIB, 100, 1),
        (16 * MIB + 1, 100, 1),
        (8 * MIB, 100, 2),
        (5 * MIB, 100, 2),
        (MIB, 100, 16),
        (256 << 10, 1000, 64),
        ((256 << 10) + 1, 1000, 32),
        (16 << 10, 1000, 64),
        ((16 << 10) - 1, 1000, 128),
        (4, 10**7, 262144),
        (1, 10**7, MIB),
        (1, 1000, 1000),
        (4, 100, 100),
        (4, 64, 64),
        (4, 3, 3),
        (20 * MIB, 1, 1),
    ],
)  # fmt: skip
def test_chunks_hold(sample_bytes, count, expected):
    assert chunk_samples(sample_bytes, count) == expected


@given(st.integers(1, 64 * MIB), st.integers(1, 10**6))
@settings(max_examples=200, deadline=None)
def test_a_chunk_is_as_the_rule_says(sample_bytes, count):
    chunk = chunk_samples(sample_bytes, count)
    assert chunk == count or (chunk < count and chunk.bit_count() == 1)
    assert chunk * sample_bytes <= 16 * MIB or chunk == 1
    if chunk < min(64, count):
        assert 2 * chunk * sample_bytes > 16 * MIB
    if chunk > 64:
        assert 64 * sample_bytes < MIB
    if 64 <= chunk < count:
        assert chunk * sample_bytes >= MIB


@pytest.mark.parametrize(
    ("shape", "dtype"), [((), "uint8"), ((3,), "float16"), ((2, 300, 300), "float32"), ((1,), "uint32")]
)
@pytest.mark.parametrize("pieces", [[150], [64, 64, 22], [1] * 150, [100, 0, 50]])
def test_an_array_is_what_was_appended(tmp_path, shape, dtype, pieces):
    count = 150 if shape != (2, 300, 300) else 15
    values = np.random.default_rng(0).integers(0, 200, (count, *shape)).astype(dtype)
    objects = LocalObjects(tmp_path)
    writer = ArrayWriter(objects, "a/b", count, shape, dtype, [f"x{i}" for i in range(len(shape))], {"id": "t"})
    start = 0
    for piece in pieces:
        writer.append(values[start : start + piece])
        start += piece
    array = StoredArray.of(objects, "a/b", writer.finish())
    assert (array.shape, array.dtype) == (values.shape, values.dtype)
    for low, high in [(0, count), (0, 1), (count - 1, count), (3, 11), (count // 2, count)]:
        assert array.read(low, high).tobytes() == values[low:high].tobytes()
    assert np.array_equal(zarr.open_array(str(tmp_path / "a/b"), mode="r")[:], values)


def test_the_last_chunk_is_padded_and_read_without_its_padding(tmp_path):
    objects = LocalObjects(tmp_path)
    writer = ArrayWriter(objects, "a", 100, (40_000,), "uint8", ["x"], {})
    values = np.random.default_rng(0).integers(0, 256, (100, 40_000), np.uint8)
    writer.append(values)
    array = StoredArray.of(objects, "a", writer.finish())
    assert array.chunk_shape == (64, 40_000)
    assert len(set(array.lengths)) == 1
    assert np.array_equal(array.chunk(1), values[64:])


@pytest.mark.parametrize("given_samples", [0, 9, 11])
def test_an_array_of_too_few_or_many_samples_is_not_finished(tmp_path, given_samples):
    def write() -> None:
        writer = ArrayWriter(LocalObjects(tmp_path), "a", 10, (2,), "uint8", ["x"], {})
        writer.append(np.zeros((given_samples, 2), np.uint8))
        writer.finish()

    with pytest.raises(RuntimeError, match=rf"a: {given_samples} samples were given for 10"):
        write()


@pytest.mark.parametrize("fill", [0, 1])
def test_an_array_of_zeros_has_all_of_its_chunks(tmp_path, fill):
    writer = ArrayWriter(LocalObjects(tmp_path), "a", 200, (20_000,), "uint8", ["x"], {})
    writer.append(np.full((200, 20_000), fill, np.uint8))
    entry = writer.finish()
    assert sorted(p.relative_to(tmp_path / "a").as_posix() for p in (tmp_path / "a" / "c").rglob("*/0")) == [
        "c/0/0", "c/1/0", "c/2/0", "c/3/0",
    ]  # fmt: skip
    assert (StoredArray.of(LocalObjects(tmp_path), "a", entry).read(0, 200) == fill).all()


def test_a_missing_chunk_is_damage_though_zarr_reads_zeros(small):
    task = next(iter(small.values))
    array = small.store.marker(task).arrays["data"]
    path = small.store.objects.root / array.path
    (path / "c" / "0" / "0" / "0" / "0").unlink()
    assert (zarr.open_array(str(path), mode="r")[:] == 0).all()
    with pytest.raises(DamageError, match=re.escape(f"{array.path}/c/0/0/0/0: missing")):
        array.read(0, 1)
    with pytest.raises(DamageError, match="missing"):
        small.store.array("t").compute()


def test_chunks_in_exchange_for_each_other_are_damage(kept, tmp_path):
    objects = LocalObjects(tmp_path)
    writer = ArrayWriter(objects, "a", 128, (20_000,), "uint8", ["x"], {})
    writer.append(np.random.default_rng(0).integers(0, 256, (128, 20_000), np.uint8))
    array = StoredArray.of(objects, "a", writer.finish())
    one, two = objects.get("a/c/0/0"), objects.get("a/c/1/0")
    objects.put("a/c/0/0", two)
    objects.put("a/c/1/0", one)
    for number in range(2):
        with pytest.raises(DamageError, match=rf"a/c/{number}/0: damaged: its checksum"):
            array.chunk(number)


# ---------------------------------------------------------------------------------------------- read by anybody


@pytest.mark.parametrize("codec", ["u8", "f16", "f32"])
def test_zarr_alone_reads_a_target(kept, codec):
    small, values = kept
    root = zarr.open_group(str(small.store.objects.root), mode="r")
    assert root.attrs["teacher_store"] == {"format": 1}
    for task, expected in values[codec].items():
        marker = small.store.marker(task)
        for name, array in marker.arrays.items():
            alone = zarr.open_array(
                str(small.store.objects.root / task.folder / marker.content["attempt"] / name), mode="r"
            )
            assert np.array_equal(alone[:], array.read(0, array.shape[0]))
            assert alone.attrs.asdict() == {"id": task.id, "shard": task.shard, "view": task.view}
            assert alone.metadata.dimension_names[0] == "sample"
        data = decoded(small.store, task, codec)
        assert np.abs(data - expected).max() <= {"u8": 0.02, "f16": 2e-3, "f32": 0}[codec]


@pytest.mark.parametrize("codec", ["u8", "f16", "f32"])
def test_dask_gives_the_decoded_values_of_all_shards_and_views(kept, codec):
    small, values = kept
    array = small.store.array(codec)
    expected = np.concatenate([decoded(small.store, task, codec) for task in sorted(values[codec])])
    assert (array.shape, array.dtype) == ((2 * 2 * 70, 3, 4, 4), np.float32)
    assert np.array_equal(array.compute(), expected)
    assert np.array_equal(array[100:150:7].compute(), expected[100:150:7])
    assert [task.view for task in sorted(values[codec])] == [0, 1, 0, 1]


def test_an_array_of_nothing_is_a_clear_error(kept):
    small, _ = kept
    with pytest.raises(UserError, match=r"no target is called 'f23'\. Did you mean 'f32'"):
        small.store.array("f23")


def crc32c(data: bytes) -> int:
    """Castagnoli's checksum, as RFC 3720 defines it."""
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    state = 0xFFFFFFFF
    for byte in data:
        state = state >> 8 ^ table[(state ^ byte) & 0xFF]
    return state ^ 0xFFFFFFFF


@pytest.mark.parametrize("codec", ["u8", "f16", "f32"])
def test_a_chunk_can_be_read_with_the_standard_library_and_numpy(kept, codec):
    small, _ = kept
    task = sorted(t for t in small.store.done() if t.id == codec)[1]
    root = Path(small.store.url)

    marker = json.loads((root / "done" / f"target.{codec}.{task.shard}.1.json").read_text())
    entry = marker["arrays"]["data"]
    shape, dtype = entry["metadata"]["shape"], entry["metadata"]["data_type"]
    chunk_shape = entry["metadata"]["chunk_grid"]["configuration"]["chunk_shape"]
    lengths = base64.b64decode(entry["lengths"])
    checksums = base64.b64decode(entry["checksums"])
    folder = root / "targets" / codec / task.shard / "1" / marker["attempt"] / "data"
    parts = []
    for number in range(-(-shape[0] // chunk_shape[0])):
        chunk = (folder / "c" / str(number) / "0" / "0" / "0").read_bytes()
        assert struct.unpack_from("<I", lengths, 4 * number) == (len(chunk),)
        assert checksums[4 * number : 4 * number + 4] == chunk[-4:] == struct.pack("<I", crc32c(chunk[:-4]))
        parts.append(np.frombuffer(chunk[:-4], np.dtype(dtype).newbyteorder("<")).reshape(chunk_shape))
    values = np.concatenate(parts)[: shape[0]]

    assert np.array_equal(values, small.store.marker(task).arrays["data"].read(0, 70))
    assert json.loads((folder / "zarr.json").read_text()) == entry["metadata"]


@pytest.mark.slow
def test_real_targets_are_read_by_zarr_and_dask_alike(world):
    store = Store.open(world.store)
    for name, codec in (("activations f32", "f32"), ("activations u8", "u8"), ("q", "f16")):
        id = world.targets[name]
        values = store.array(id).compute()
        tasks = sorted(t for t in store.done() if t.id == id)
        assert len(values) == 150 * len(tasks) == 600
        assert np.array_equal(values[150:300], decoded(store, tasks[1], codec))
        marker = store.marker(tasks[0])
        folder = world.store / tasks[0].folder / marker.content["attempt"]
        arrays = {array: zarr.open_array(str(folder / array), mode="r")[:] for array in marker.arrays}
        assert np.array_equal(decode(codec, arrays), values[:150])


def test_the_card_lists_everything_and_its_example_runs(kept, monkeypatch):
    small, _ = kept
    text = card(small.store)
    for id in ("u8", "f16", "f32", small.policy.bank, "3×4×4"):
        assert f" {id} " in text
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("|")}
    assert rows["u8"].endswith("| u8 |  | 2 | 4 |")
    assert rows[small.policy.bank].endswith("| 2 | 4 |")
    monkeypatch.chdir(small.store.url)
    found: dict[str, object] = {}
    exec(text.split("```python\n")[1].split("```")[0], found)
    first = min(task for task in small.store.done() if task.kind == "target")
    assert np.array_equal(found["values"], small.store.marker(first).arrays["data"].read(0, 70))


def test_the_tables_of_a_card_have_as_many_cells_in_every_row(world):
    text = card(Store.open(world.store))
    assert text == (world.store / "README.md").read_text()
    for file in world.weights.values():  # a store is published too
        assert f" {Path(file).name} " in text
        assert str(Path(file).parent) not in text
    for name in ("cnn", "vit", "resnet10t", *world.targets.values(), *Store.open(world.store).banks()):
        assert name in text
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == 3
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1


def test_a_card_of_an_empty_store_says_so(tmp_path):
    assert "## Targets" in card(Store.create(tmp_path / "store"))


# ---------------------------------------------------------------------------------------------- replay


def test_views_replay_as_they_were_recorded(world):
    store = Store.open(world.store)
    for url in world.shards:
        index = store.require(url, store.shard_ids())
        for task in sorted(t for t in store.done() if t.kind == "bank" and t.shard == index.id):
            policy = bank_policy(store, task.id)
            views = read_views(store.marker(task), 60, 75)
            for i, found in enumerate(read_samples(url, index, range(60, 75))):
                pixels = views.replay(i, found, found.image, policy.size, url)
                assert pixels.shape == (32, 32, 3)


def test_another_image_or_renderer_is_named_at_replay(kept):
    small, _ = kept
    index, url = small.indexes[0], small.shards[0]
    marker = small.store.marker(Task("bank", small.policy.bank, index.id, 0))
    views = read_views(marker, 0, 2)
    originals = read_samples(url, index, range(2))
    with pytest.raises(IdentityError) as error:
        views.replay(0, originals[0], originals[1].image, 8, url)
    assert error.value.field == "signature of the view's pixels"
    assert error.value.expected == f"{int(views.signatures[0]):08x}"
    assert originals[0].key in str(error.value)
    assert "same versions" in str(error.value)
    with pytest.raises(IdentityError, match=r"pillow 1\.0/"):
        dataclasses.replace(views, renderer={**views.renderer, "pillow": "1.0"}).replay(
            0, originals[0], originals[1].image, 8, url
        )
    assert isinstance(views.view(1), View)


def test_a_bank_whose_views_need_newer_operations_says_so(small):
    line = policy("light", 16)
    identity = {**line.identity, "operations": OPERATIONS_VERSION + 1}
    id = f"light-{records.digest_of(identity)[:8]}"
    small.store.add_bank(id, identity, {})
    with pytest.raises(UserError, match=rf"bank {id}: its views need a newer version"):
        bank_policy(small.store, id)


def test_a_bank_whose_manifest_is_anothers_is_damage(small):
    manifest = small.store.banks()[small.policy.bank]
    other = {**manifest, "identity": {**manifest["identity"], "size": 9}}
    small.store.objects.put(f"banks/{small.policy.bank}/manifest.json", records.dump(other))
    with pytest.raises(DamageError, match=r"manifest\.json: damaged"):
        bank_policy(small.store, small.policy.bank)


# ---------------------------------------------------------------------------------------------- opening


@pytest.mark.parametrize("place", ["folder", "memory"])
def test_a_new_store_is_opened_again(tmp_path, place):
    where = tmp_path / "a" / "store" if place == "folder" else f"memory://{uuid.uuid4().hex}/store"
    with pytest.raises(UserError, match="no store here"):
        Store.open(where)
    created = Store.create(where)
    assert Store.open(where).url == Store.create(where).url == created.url == pickle.loads(pickle.dumps(created)).url
    assert (created.banks(), created.teachers(), created.targets(), created.shard_ids()) == ({}, {}, {}, [])
    assert created.done() == set()


def test_what_is_no_store_is_a_clear_error(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "photo.png").write_text("x")
    (tmp_path / "zarr").mkdir()
    zarr.create_group(str(tmp_path / "zarr"))
    for name, message in (("empty", "no store here"), ("other", "no store here"), ("nowhere", "no store here"),
                          ("file", "not a folder"), ("zarr", "not the root of a store")):  # fmt: skip
        with pytest.raises(UserError, match=message) as error:
            Store.open(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)
    for name in ("other", "file", "zarr"):
        before = files_of(tmp_path)
        with pytest.raises(UserError) as error:
            Store.create(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)
        assert files_of(tmp_path) == before


def test_a_newer_format_is_said_to_be_one(tmp_path):
    store = Store.create(tmp_path)
    root = store.objects.get("zarr.json")
    store.objects.put("zarr.json", root.replace(b'"format":1', b'"format":12'))
    for look in (Store.open, Store.create):
        with pytest.raises(UserError, match="store format 12, this version reads 1; install a newer one") as error:
            look(tmp_path)
        assert not isinstance(error.value, DamageError)


def test_a_store_whose_root_is_gone_is_damage(small):
    small.store.objects.remove("zarr.json")
    for look in (Store.open, Store.create):
        with pytest.raises(DamageError, match=r"zarr\.json: missing"):
            look(small.store.url)


def test_two_that_create_a_store_at_once_share_it(tmp_path):
    class Late(LocalObjects):
        """Looks just before another process creates the store."""

        looked = False

        def get(self, key: str) -> bytes:
            if not self.looked:
                self.looked = True
                Store.create(self.url)
                raise FileNotFoundError(key)
            return super().get(key)

    assert Store.create(Late(tmp_path / "store")).url == str(tmp_path / "store")
    with ThreadPoolExecutor(8) as threads:
        stores = list(threads.map(Store.create, [tmp_path / "racing"] * 8))
    assert {store.url for store in stores} == {str(tmp_path / "racing")}


def test_a_store_may_be_in_memory(tmp_path):
    place = f"memory://{uuid.uuid4().hex}"
    shard = f"{place}/data/x.tar"
    open_objects(f"{place}/data").put("x.tar", Path(write_tar(tmp_path / "x.tar", samples(10))).read_bytes())
    small = SmallStore(f"{place}/store", [shard], views=2)
    values = small.add_target("t", "f32")
    again = Store.open(f"{place}/store")
    assert {task for task in again.done() if task.kind == "target"} == set(values)
    for task, expected in values.items():
        assert np.array_equal(decoded(again, task, "f32"), expected)
    assert again.require(shard, again.shard_ids()) == small.indexes[0]
    assert np.array_equal(again.array("t").compute(), np.concatenate([values[task] for task in sorted(values)]))
    assert again.views("target", "t", again.shard_ids(), again.done()) == 2
    assert "| t |" in card(again)


# ---------------------------------------------------------------------------------------------- tasks, markers

names = st.text("abcXYZ019_-", min_size=1, max_size=12)


@given(st.sampled_from(["bank", "target"]), names, names, st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_a_task_is_read_back_from_its_name(kind, id, shard, view):
    task = Task(kind, id, shard, view)
    assert Task.named(task.name) == task


@pytest.mark.parametrize(
    "name", ["", "x.json", "target.a.b.json", "target.a.b.1.json.part", "teacher.a.b.1.json", "target.a.b.c.1.json",
             "target.a.b.-1.json", ".DS_Store", "target.a.b.1.jsonx"],
)  # fmt: skip
def test_other_names_are_no_tasks(name):
    assert Task.named(name) is None


def test_done_is_what_was_committed(kept):
    small, values = kept
    banks = {Task("bank", small.policy.bank, i.id, v) for i in small.indexes for v in range(2)}
    assert small.store.done() == banks | {task for tasks in values.values() for task in tasks}


def test_an_attempt_counts_from_its_commit_on(small):
    task = Task("target", "t", small.indexes[0].id, 2)
    values = np.ones((10, 3, 4, 4), np.float32)
    attempt = small.attempt(task, "u8", values)
    assert task not in small.store.done()
    with pytest.raises(DamageError, match=re.escape(task.name)):
        small.store.marker(task)
    assert attempt.commit({"bank_views": "x"}).content["attempt"] == attempt.name
    assert task in small.store.done()
    assert np.array_equal(decoded(small.store, task, "u8"), values)


def test_of_two_attempts_at_one_task_the_first_counts(small):
    task = Task("target", "t", small.indexes[0].id, 2)
    ones = np.ones((10, 3, 4, 4), np.float32)
    first, second = small.attempt(task, "f32", ones), small.attempt(task, "f32", ones * 2)
    marker = first.commit({"bank_views": "x"})
    before = files_of(small.store.objects.root)
    assert second.commit({"bank_views": "x"}).content == marker.content
    assert small.store.objects.names(task.folder) == [first.name]
    assert {k: v for k, v in files_of(small.store.objects.root).items() if second.name not in k} == {
        k: v for k, v in before.items() if second.name not in k
    }
    assert np.array_equal(decoded(small.store, task, "f32"), ones)


def test_of_two_threads_that_commit_one_task_one_counts(small):
    for view in range(2, 6):
        task = Task("target", "t", small.indexes[0].id, view)
        values = [np.full((10, 3, 4, 4), number, np.float32) for number in range(2)]
        barrier = threading.Barrier(2)

        def work(number: int, task=task, values=values, barrier=barrier) -> str:
            attempt = small.attempt(task, "f32", values[number])
            barrier.wait()
            return attempt.commit({"bank_views": "x"}).content["attempt"]

        with ThreadPoolExecutor(2) as threads:
            counts = list(threads.map(work, range(2)))
        assert counts[0] == counts[1]
        assert small.store.objects.names(task.folder) == [counts[0]]
        found = decoded(small.store, task, "f32")
        assert any(np.array_equal(found, each) for each in values)


def test_abandoning_removes_only_what_does_not_count(small):
    task = Task("target", "t", small.indexes[0].id, 2)
    ones = np.ones((10, 3, 4, 4), np.float32)
    first, second = small.attempt(task, "f32", ones), small.attempt(task, "f32", ones)
    second.abandon()
    assert small.store.objects.names(task.folder) == [first.name]
    first.commit({"bank_views": "x"})
    first.abandon()  # a failure of something else, later
    assert np.array_equal(decoded(small.store, task, "f32"), ones)


@pytest.mark.parametrize(
    ("operation", "fault"), [("link", "lost"), ("sync", "EIO"), ("write", "ENOSPC"), ("link", "EIO")]
)
def test_a_commit_that_fails_and_is_abandoned_leaves_no_hole(small, operation, fault):
    task = Task("target", "t", small.indexes[0].id, 2)
    ones = np.ones((10, 3, 4, 4), np.float32)
    failing = 0
    for number in range(12):  # each of the steps of a commit
        place = FaultyObjects(small.store.url, operation, -1, fault)
        small.store = Store(place)
        attempt = small.attempt(task, "f32", ones)
        place.fail_at = place.calls + number
        try:
            attempt.commit({"bank_views": "x"})
        except OSError:
            failing += 1
            attempt.abandon()
        plain = Store.open(small.store.url)
        if task in plain.done():
            assert np.array_equal(decoded(plain, task, "f32"), ones)
            plain.objects.remove(f"done/{task.name}")
        plain.objects.remove(task.folder)
    assert failing >= 1


def test_a_marker_under_another_tasks_name_is_damage(small):
    first, view, shard, _ = sorted(small.values)
    others = [view, shard, Task("target", "other", first.shard, 0), Task("bank", "t", first.shard, 0)]
    for other in others:
        small.store.objects.put(f"done/{other.name}", small.store.objects.get(f"done/{first.name}"))
        with pytest.raises(DamageError, match=rf"{re.escape(other.name)}: damaged: it is the marker of target\.t\."):
            small.store.marker(other)


def test_a_writer_takes_a_damaged_marker_for_none(small):
    task = min(small.values)
    assert small.store.find(task).task == task
    good = small.store.objects.get(f"done/{task.name}")
    small.store.objects.put(f"done/{task.name}", good.replace(b'"view":0', b'"view":1'))
    assert small.store.find(task) is None
    assert task not in small.store.done()
    assert small.store.find(task) is None


def test_a_marker_that_somebody_put_in_place_of_a_judged_one_stays(small):
    task = min(small.values)
    judged = small.store.marker(task)
    good = small.store.objects.get(f"done/{task.name}")
    small.store.objects.put(f"done/{task.name}", records.dump({**judged.content, "by": "another run"}))
    small.store.discard(judged)
    assert small.store.marker(task).content["by"] == "another run"
    small.store.objects.put(f"done/{task.name}", good)
    small.store.discard(judged)
    assert task not in small.store.done()


def test_how_many_views_a_target_has(small):
    store, shards = small.store, [index.id for index in small.indexes]
    assert store.views("target", "t", shards, store.done()) == 2
    third = Task("target", "t", shards[0], 2)
    small.attempt(third, "u8", np.ones((10, 3, 4, 4), np.float32)).commit({"bank_views": "x"})
    assert store.views("target", "t", shards[:1], store.done()) == 3
    with pytest.raises(DamageError, match=re.escape(third.name.replace(shards[0], shards[1]))):
        store.views("target", "t", shards, store.done())
    assert store.views("target", "t", shards, store.done(), wanted=2) == 2
    assert store.views("target", "t", shards[1:], store.done()) == 2
    assert store.views("target", "nothing", shards, store.done()) == 0


@pytest.mark.parametrize("view", [0, 1])
def test_a_gap_in_the_views_names_the_marker(small, view):
    task = sorted(small.values)[view]
    small.store.objects.remove(f"done/{task.name}")
    with pytest.raises(DamageError, match=rf"done/{re.escape(task.name)}: missing"):
        small.store.views("target", "t", [index.id for index in small.indexes], small.store.done())


# ---------------------------------------------------------------------------------------------- manifests

IDENTITY = {"model": "resnet10t", "arguments": {}, "weights sha256": "a" * 64, "input size": 64}


def test_another_teacher_under_a_known_name_is_refused(small):
    first = small.store.add_teacher("cnn", IDENTITY, {"layers": 4})
    assert small.store.add_teacher("cnn", IDENTITY, {"layers": 99}) == first == small.store.teachers()["cnn"]
    for field, value in (("weights sha256", "b" * 64), ("input size", 32), ("arguments", {"in_chans": 1}), ("new", 1)):
        before = files_of(small.store.objects.root)
        with pytest.raises(IdentityError) as error:
            small.store.add_teacher("cnn", {**IDENTITY, field: value}, {})
        assert (error.value.field, error.value.expected, error.value.found) == (field, IDENTITY.get(field), value)
        assert "--as cnn-2" in str(error.value)
        assert "teacher 'cnn'" in str(error.value)
        assert files_of(small.store.objects.root) == before


def test_a_target_or_bank_with_another_identity_under_its_id_is_refused(small):
    with pytest.raises(IdentityError) as error:
        small.store.add_target("t", {**small.store.target("t")["identity"], "codec": "f32"}, {})
    assert (error.value.field, error.value.expected, error.value.found) == ("codec", "u8", "f32")
    with pytest.raises(IdentityError, match="seed: expected 0, found 1"):
        small.store.add_bank(small.policy.bank, {**small.policy.identity, "seed": 1}, {})


def test_an_unknown_target_names_the_nearest(small):
    with pytest.raises(UserError, match=r"no target is called 'tt'\. Did you mean 't'"):
        small.store.target("tt")


def test_adding_a_target_or_teacher_touches_nothing_that_is_there(small):
    root = small.store.objects.root
    before = files_of(root)
    small.add_target("another", "f16")
    small.store.add_teacher("cnn", IDENTITY, {})
    small.store.add_graph("cnn", b"graph")
    small.store.add_index(small.indexes[0], small.shards[0])
    after = files_of(root)
    assert {path: after[path] for path in before} == before
    assert len(after) > len(before)
    assert np.array_equal(
        decoded(small.store, min(small.values), "u8"), decoded(Store.open(root), min(small.values), "u8")
    )


def test_graphs_are_kept_under_their_digest(small):
    digest = small.store.add_graph("cnn", b"graph")
    assert small.store.add_graph("cnn", b"graph") == digest
    assert small.store.graph("cnn", digest) == b"graph"
    assert small.store.add_graph("cnn", b"another") != digest


# ---------------------------------------------------------------------------------------------- shards


def test_a_known_shard_is_recognised_wherever_it_lies(small, tmp_path):
    copy = tmp_path / "elsewhere" / Path(small.shards[0]).name
    copy.parent.mkdir()
    copy.write_bytes(Path(small.shards[0]).read_bytes())
    assert small.store.require(str(copy), small.store.shard_ids()) == small.indexes[0]
    assert small.store.index(small.indexes[0].id) == small.indexes[0]


def test_two_shards_of_one_name_are_told_apart(tmp_path):
    paths = [write_tar(tmp_path / folder / "000000.tar", samples(5, first=i * 5)) for i, folder in enumerate("ab")]
    small = SmallStore(tmp_path / "store", paths)
    assert len(small.store.shard_ids()) == 2
    for path, index in zip(paths, small.indexes, strict=True):
        assert small.store.require(path, small.store.shard_ids()) == index


def test_the_same_samples_in_a_tar_with_other_headers_are_known(tmp_path):
    members = samples(5)
    small = SmallStore(tmp_path / "store", [write_tar(tmp_path / "a" / "x.tar", members)])
    other = write_tar(tmp_path / "b" / "x.tar", members, mtime=99)
    index = small.store.require(other, small.store.shard_ids())
    assert index == build_index(other)
    assert index.id == small.indexes[0].id
    assert [s.key for s in read_samples(other, index, range(5))] == list(small.indexes[0].keys)


def test_other_labels_than_the_stores_are_refused_whatever_the_headers(tmp_path):
    small = SmallStore(tmp_path / "store", [write_tar(tmp_path / "a" / "x.tar", samples(5))])
    for number, members in enumerate([
        [(n, b"8") if n == "s002.cls" else (n, d) for n, d in samples(5)],
        [(n, d) for n, d in samples(5) if n != "s002.cls"],
    ]):  # fmt: skip
        other = write_tar(tmp_path / str(number) / "x.tar", members, mtime=99)
        with pytest.raises(IdentityError) as error:
            small.store.require(other, small.store.shard_ids())
        assert error.value.field == "label of key s002"
        assert (error.value.expected, error.value.found) == (2, [8, None][number])


def test_an_unknown_shard_counts_the_images_that_are_known(tmp_path):
    small = SmallStore(tmp_path / "store", [write_tar(tmp_path / f"x{i}.tar", samples(5, first=5 * i)) for i in (0, 1)])
    mixed = [*sample("n0", 3), *sample("n1", 7), *sample("n2", 50), *sample("n3", 9)]
    other = write_tar(tmp_path / "other.tar", mixed)
    with pytest.raises(IdentityError, match="3 of its 4 images are known") as error:
        small.store.require(other, small.store.shard_ids())
    assert error.value.field == "shard"
    assert error.value.found == build_index(other).id
    assert small.indexes[0].id in str(error.value.expected)


def test_a_known_name_with_other_content_names_the_first_difference(tmp_path):
    members = samples(5)
    small = SmallStore(tmp_path / "store", [write_tar(tmp_path / "a" / "x.tar", members)])
    known = small.indexes[0]
    other_key = [(n.replace("s003", "t003"), d) for n, d in members]
    other_image = [*members[:6], *sample("s003", 77), *members[8:]]
    for number, (changed, field, expected) in enumerate([
        (other_key, "key of sample 3", "s003"),
        (other_image, "image digest of key s003", known.digests[3]),
        (members[:6], "samples", 5),
        (members[2:], "key of sample 0", "s000"),
    ]):  # fmt: skip
        path = write_tar(tmp_path / str(number) / "x.tar", changed)
        with pytest.raises(IdentityError, match=r"\d of its \d images are known") as error:
            small.store.require(path, small.store.shard_ids())
        assert (error.value.field, error.value.expected) == (field, expected)


def test_the_index_of_a_shard_that_is_gone_is_damage(small):
    shard = small.indexes[0].id
    small.store.objects.remove(f"shards/{shard}.json")
    with pytest.raises(DamageError, match=rf"{shard}\.json: missing"):
        small.store.index(shard)
    with pytest.raises(DamageError, match=rf"{shard}\.json: missing"):
        small.store.require(small.shards[0], small.store.shard_ids())
    small.store.objects.put(f"shards/{shard}.json", small.indexes[1].dump())
    with pytest.raises(DamageError, match=f"it is the index of {small.indexes[1].id}"):
        small.store.index(shard)


# ---------------------------------------------------------------------------------------------- errors, records


def test_errors_survive_the_way_from_a_worker():
    error = IdentityError("x.tar", "label", 1, 2, "do this")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "x.tar: label: expected 1, found 2\n  do this"
    assert (type(again), again.field, again.expected, again.found) == (IdentityError, "label", 1, 2)
    assert str(pickle.loads(pickle.dumps(DamageError("gone")))) == "gone"


def test_the_nearest_word_is_proposed_or_all_are_listed():
    assert nearest("resiez", ["resize", "crop"]) == "Did you mean 'resize'?"
    assert nearest("zzz", ["b", "a"]) == "Known: a, b."
    assert nearest("zzz", []) == "None is known here."


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=6,
)  # fmt: skip


@given(st.dictionaries(st.text().filter(lambda key: key != "digest"), json_values, max_size=4))
@settings(max_examples=60, deadline=None)
def test_a_record_is_read_back_and_only_in_its_one_spelling(content):
    data = records.dump(content)
    again = records.load(data, "x")
    assert {key: value for key, value in again.items() if key != "digest"} == content
    assert records.dump(again) == data
    for other in (data[:-1], data + b"\n", b" " + data, json.dumps(again, indent=1).encode()):
        with pytest.raises(DamageError, match="x: damaged"):
            records.load(other, "x")


def test_an_attempt_writes_below_a_name_that_nobody_else_uses(kept):
    small, _ = kept
    task = Task("target", "u8", small.indexes[0].id, 9)
    assert len({Attempt(small.store, task, 70).name for _ in range(100)}) == 100
