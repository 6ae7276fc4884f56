"""Arrays: written in chunks as the rule says, readable by zarr alone or by anybody, and never silently of zeros."""

from __future__ import annotations

import base64
import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import DamageError, UserError
from storage.objects.object_store import LocalObjectStore
from storage.store.arrays import ArrayWriter, StoredArray, chunk_samples
from storage.store.card import card
from storage.store.codecs import ArraySpec
from storage.store.store import Store
from tests.storage.helpers import decoded

MIB = 1 << 20


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
        (4 << 10, 1000, 64),
        ((4 << 10) - 1, 1000, 128),
        (4, 10**7, 65536),
        (1, 10**7, MIB // 4),
        (1, 1000, 1000),
        (4, 100, 100),
        (4, 64, 64),
        (4, 3, 3),
        (20 * MIB, 1, 1),
    ],
)
def test_chunks_hold(sample_bytes, count, expected):
    assert chunk_samples(sample_bytes, count) == expected


@given(st.integers(1, 64 * MIB), st.integers(1, 10**6))
@settings(max_examples=200)
def test_a_chunk_is_as_the_rule_says(sample_bytes, count):
    chunk = chunk_samples(sample_bytes, count)
    assert chunk == count or (chunk < count and chunk.bit_count() == 1)
    assert chunk * sample_bytes <= 16 * MIB or chunk == 1
    if chunk < min(64, count):
        assert 2 * chunk * sample_bytes > 16 * MIB
    if chunk > 64:
        assert 64 * sample_bytes < MIB / 4
    if 64 <= chunk < count:
        assert chunk * sample_bytes >= MIB / 4


@pytest.mark.parametrize(
    ("shape", "dtype"), [((), "uint8"), ((3,), "float16"), ((2, 300, 300), "float32"), ((1,), "uint32")]
)
@pytest.mark.parametrize("pieces", [[150], [64, 64, 22], [1] * 150, [100, 0, 50]])
def test_an_array_is_what_was_appended(tmp_path, shape, dtype, pieces):
    count = 150 if shape != (2, 300, 300) else 15
    values = np.random.default_rng(0).integers(0, 200, (count, *shape)).astype(dtype)
    objects = LocalObjectStore(tmp_path)
    spec = ArraySpec(dtype, shape, tuple(f"x{i}" for i in range(len(shape))))
    writer = ArrayWriter(objects, "a/b", count, spec, {"id": "t"})
    start = 0
    for piece in pieces:
        writer.append(values[start : start + piece])
        start += piece
    array = StoredArray(objects, "a/b", writer.finish())
    assert (array.shape, array.dtype) == (values.shape, values.dtype)
    for low, high in [(0, count), (0, 1), (count - 1, count), (3, 11), (count // 2, count)]:
        assert array.read(low, high).tobytes() == values[low:high].tobytes()
    assert np.array_equal(zarr.open_array(str(tmp_path / "a/b"), mode="r")[:], values)


def test_the_last_chunk_is_padded_and_read_without_its_padding(tmp_path):
    objects = LocalObjectStore(tmp_path)
    writer = ArrayWriter(objects, "a", 100, ArraySpec("uint8", (40_000,), ("x",)), {})
    values = np.random.default_rng(0).integers(0, 256, (100, 40_000), np.uint8)
    writer.append(values)
    array = StoredArray(objects, "a", writer.finish())
    assert array.metadata.chunk_shape == (64, 40_000)
    assert array.size == 2 * (64 * 40_000 + 4)
    assert np.array_equal(array.chunk(1), values[64:])


@pytest.mark.parametrize("given_samples", [0, 9, 11])
def test_an_array_of_too_few_or_many_samples_is_not_finished(tmp_path, given_samples):
    def write() -> None:
        writer = ArrayWriter(LocalObjectStore(tmp_path), "a", 10, ArraySpec("uint8", (2,), ("x",)), {})
        writer.append(np.zeros((given_samples, 2), np.uint8))
        writer.finish()

    with pytest.raises(RuntimeError, match=rf"a: {given_samples} samples were given for 10"):
        write()


@pytest.mark.parametrize("fill", [0, 1])
def test_an_array_of_zeros_has_all_of_its_chunks(tmp_path, fill):
    writer = ArrayWriter(LocalObjectStore(tmp_path), "a", 200, ArraySpec("uint8", (20_000,), ("x",)), {})
    writer.append(np.full((200, 20_000), fill, np.uint8))
    entry = writer.finish()
    assert sorted(p.relative_to(tmp_path / "a").as_posix() for p in (tmp_path / "a" / "c").rglob("*/0")) == [
        "c/0/0",
        "c/1/0",
        "c/2/0",
        "c/3/0",
    ]
    assert (StoredArray(LocalObjectStore(tmp_path), "a", entry).read(0, 200) == fill).all()


def test_a_missing_chunk_is_damage_though_zarr_reads_zeros(small):
    task = next(iter(small.values))
    array = small.store.marker(task).arrays["data"]
    path = small.store.objects.root / array.path
    (path / "c" / "0" / "0" / "0" / "0").unlink()
    assert not np.any(zarr.open_array(str(path), mode="r")[:])
    with pytest.raises(DamageError, match=re.escape(f"{array.path}/c/0/0/0/0: missing")):
        array.read(0, 1)
    with pytest.raises(DamageError, match="missing"):
        small.store.array("t").compute()


def test_chunks_in_exchange_for_each_other_are_damage(kept, tmp_path):
    objects = LocalObjectStore(tmp_path)
    writer = ArrayWriter(objects, "a", 128, ArraySpec("uint8", (20_000,), ("x",)), {})
    writer.append(np.random.default_rng(0).integers(0, 256, (128, 20_000), np.uint8))
    array = StoredArray(objects, "a", writer.finish())
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
            path = small.store.objects.root / task.folder / marker.record.attempt / name
            alone = zarr.open_array(str(path), mode="r")
            assert np.array_equal(alone[:], array.read(0, array.shape[0]))
            assert alone.attrs.asdict() == {"id": task.id, "shard": task.shard, "view": task.view}
            assert json.loads((path / "zarr.json").read_text())["dimension_names"][0] == "sample"
        data = decoded(small.store, task)
        assert np.abs(data - expected).max() <= {"u8": 0.02, "f16": 2e-3, "f32": 0}[codec]


@pytest.mark.parametrize("codec", ["u8", "f16", "f32"])
def test_dask_gives_the_decoded_values_of_all_shards_and_views(kept, codec):
    small, values = kept
    array = small.store.array(codec)
    expected = np.concatenate([decoded(small.store, task) for task in sorted(values[codec])])
    assert (array.shape, array.dtype) == ((2 * 2 * 70, 3, 4, 4), np.float32)
    assert np.array_equal(array.compute(), expected)
    assert np.array_equal(array[100:150:7].compute(), expected[100:150:7])
    assert [task.view for task in sorted(values[codec])] == [0, 1, 0, 1]


def test_an_array_of_nothing_is_a_clear_error(kept):
    small, _ = kept
    with pytest.raises(UserError, match=r"no target is called 'f23'\n  Did you mean 'f32'"):
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
    for name in ("activations f32", "activations u8", "q"):
        id = world.targets[name]
        values = store.array(id).compute()
        tasks = sorted(t for t in store.done() if t.id == id)
        assert len(values) == 150 * len(tasks) == 600
        assert np.array_equal(values[150:300], decoded(store, tasks[1]))
        marker = store.marker(tasks[0])
        folder = world.store / tasks[0].folder / marker.record.attempt
        arrays = {array: zarr.open_array(str(folder / array), mode="r")[:] for array in marker.arrays}
        assert np.array_equal(store.target(id).codec.decode(arrays), values[:150])


def test_the_card_lists_everything_and_its_example_runs(kept, monkeypatch):
    small, _ = kept
    text = card(small.store)
    for id in ("u8", "f16", "f32", small.policy.bank, "3×4×4"):
        assert f" {id} " in text
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("|")}
    assert rows["u8"].endswith("| u8 |  | 2 | 4 |")
    assert rows[small.policy.bank].endswith("| 2 | 4 |")
    monkeypatch.chdir(small.store.url)
    found: dict[str, Any] = {}
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
