"""Chunks read into the arrays that are returned: the values that were written, in memory that no other read touches."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from storage.errors import DamageError
from storage.objects.object_store import open_object_store
from storage.store.arrays import ArrayWriter, StoredArray
from storage.store.codecs import ArraySpec


@pytest.fixture(params=["local", "memory"])
def array(request, tmp_path):
    """An array of three chunks of 64, 64 and 22 samples, and its values."""
    objects = open_object_store(tmp_path if request.param == "local" else f"memory://{uuid.uuid4().hex}")
    values = np.random.default_rng(0).integers(0, 60_000, (150, 90, 100)).astype(np.uint16)
    writer = ArrayWriter(objects, "a", 150, ArraySpec("uint16", (90, 100), ("x", "y")), {})
    writer.append(values)
    stored = StoredArray(objects, "a", writer.finish())
    assert stored.metadata.chunk_shape == (64, 90, 100)
    return stored, values


def test_reads_in_several_threads_are_what_was_written_and_stay_so(array) -> None:
    stored, values = array
    ranges = [tuple(sorted(np.random.default_rng(i).integers(0, 151, 2).tolist())) for i in range(60)]
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda bounds: stored.read(*bounds), ranges))
    for found, (start, stop) in zip(read, ranges, strict=True):
        assert np.array_equal(found, values[start:stop])
        assert found.flags.c_contiguous
        assert found.flags.writeable
        assert found.flags.owndata


@pytest.mark.parametrize("place", [0, 70_000, 128 * 9000 - 1, 128 * 9000, 128 * 9000 + 3])
def test_a_byte_of_a_chunk_that_was_not_asked_for_is_damage_too(array, place) -> None:
    stored, _ = array
    data = bytearray(stored.objects.get("a/c/1/0/0"))
    data[place] ^= 1
    stored.objects.put("a/c/1/0/0", bytes(data))
    with pytest.raises(DamageError, match="a/c/1/0/0: damaged: its checksum"):
        stored.read(90, 92)
    with pytest.raises(DamageError, match="a/c/1/0/0: damaged: its checksum"):
        stored.check_chunk(1)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_chunk_of_another_length_is_damage(array, change) -> None:
    stored, values = array
    data = stored.objects.get("a/c/2/0/0")
    stored.objects.put("a/c/2/0/0", data[:-1] if change < 0 else data + b"\0")
    with pytest.raises(DamageError, match=f"damaged: {len(data) + change} bytes, {len(data)} were written"):
        stored.read(100, 150)
    assert np.array_equal(stored.read(0, 128), values[:128])


def test_a_file_that_becomes_shorter_while_it_is_read_is_an_error(tmp_path, monkeypatch) -> None:
    objects = open_object_store(tmp_path)
    objects.put("x", bytes(100))
    buffer = np.empty(100, np.uint8)
    monkeypatch.setattr("os.fstat", lambda _: type("Stat", (), {"st_size": 100}))
    Path(tmp_path / "x").write_bytes(bytes(60))
    with pytest.raises(OSError, match="became shorter"):
        objects.get_into("x", [buffer])
