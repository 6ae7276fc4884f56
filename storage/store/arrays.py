"""Arrays at rest: plain zarr v3, chunked along the samples, each chunk ending in its crc32c.

zarr writes. Reading goes round zarr, because zarr takes a missing chunk for zeros: here every chunk's length and
trailing checksum are compared with what the marker says was written, and its bytes with the checksum.
"""

from __future__ import annotations

import base64
import functools
import json
import math
import threading
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired, Self

import google_crc32c
import numpy as np
import zarr
from pydantic import Field, model_validator
from typing_extensions import TypedDict
from zarr.codecs import Crc32cCodec

from storage.constants import BLOCK
from storage.errors import DamageError
from storage.objects.record_schema import LARGEST, MOST_SAMPLES, Schema, Several
from storage.objects.zarr_store import ZarrStore

if TYPE_CHECKING:
    from storage.objects.json_record import Record
    from storage.objects.object_store import ObjectStore
    from storage.store.codecs import ArraySpec

SMALL, LARGE = 1 << 18, 16 << 20


def read_written(objects: ObjectStore, key: str, loss: str, hint: str = "") -> bytes:
    """The bytes of an object that was written. Raises DamageError, with what its `loss` means, where it is missing."""
    try:
        return objects.get(key)
    except FileNotFoundError:
        raise missing(objects, key, loss, hint) from None


def missing(objects: ObjectStore, key: str, loss: str, hint: str = "") -> DamageError:
    """The error that an object that was written is gone, with what its `loss` means."""
    return DamageError(f"{objects.url}/{key}: missing: {loss}", hint=hint)


def chunk_samples(sample_bytes: int, samples: int) -> int:
    """How many samples a chunk holds.

    The largest power of two up to 64 that stays under 16 MiB, at least 1; if 64 give less than 256 KiB, doubled until
    they do; never more than there are samples.
    """
    count = BLOCK
    while count > 1 and count * sample_bytes > LARGE:
        count //= 2
    while count >= BLOCK and count * sample_bytes < SMALL and count < samples:
        count *= 2
    return min(count, samples)


class ArrayWriter:
    """One new array `[samples, …]` that is filled from its first sample to its last, whole chunks at a time."""

    def __init__(self, objects: ObjectStore, path: str, samples: int, spec: ArraySpec, attributes: Record) -> None:
        dtype = np.dtype(spec.dtype)
        chunk = chunk_samples(dtype.itemsize * math.prod(spec.shape), samples)
        self._store = ZarrStore(objects, path)
        self._array = zarr.create_array(
            self._store,
            shape=(samples, *spec.shape),
            dtype=dtype,
            chunks=(chunk, *spec.shape),
            filters=None,
            compressors=[Crc32cCodec()],
            fill_value=0,
            dimension_names=["sample", *spec.axes],
            attributes=attributes,
            config={"write_empty_chunks": True},
        )
        self.path, self.chunk = path, chunk
        self._buffer = np.zeros((chunk, *spec.shape), dtype)
        self._filled = self._written = 0

    def append(self, values: np.ndarray) -> None:
        """Add samples `[n, …]`."""
        while len(values):
            part = values[: self.chunk - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            values = values[len(part) :]
            if self._filled == self.chunk:
                self._flush()

    def _flush(self) -> None:
        stop = self._written + self._filled
        self._array[self._written : stop] = self._buffer[: self._filled]
        self._written, self._filled = stop, 0

    def finish(self) -> ArrayRecord:
        """Write what is left; the array's entry in a marker: metadata, and length and checksum of each chunk."""
        if self._filled:
            self._flush()
        if self._written != self._array.shape[0]:
            raise RuntimeError(f"{self.path}: {self._written} samples were given for {self._array.shape[0]}")
        metadata = ArrayMetadata.model_validate(json.loads(self._store.objects.get(f"{self.path}/zarr.json")))
        written = [self._store.written[metadata.key(self.path, number)] for number in range(metadata.chunks)]
        lengths = base64.b64encode(np.array([length for length, _ in written], "<u4").tobytes()).decode()
        checksums = base64.b64encode(b"".join(trailer for _, trailer in written)).decode()
        return ArrayRecord(metadata=metadata, lengths=lengths, checksums=checksums)


_Sizes = Annotated[Several[Annotated[int, Field(ge=1, le=MOST_SAMPLES)]], Field(min_length=1, max_length=8)]


class _Chunks(TypedDict):  # lighter than a model, with the configuration of the one that holds it
    chunk_shape: _Sizes


class _Grid(TypedDict):
    name: Literal["regular"]
    configuration: _Chunks


class _Named(TypedDict):
    name: str
    configuration: NotRequired[dict[str, Any]]


class ArrayMetadata(Schema):
    """An array's `zarr.json`: chunked along the samples alone."""

    zarr_format: Literal[3]
    node_type: Literal["array"]
    shape: _Sizes
    data_type: Literal["uint8", "uint16", "uint32", "float16", "float32", "float64"]
    chunk_grid: _Grid
    chunk_key_encoding: _Named
    codecs: Several[_Named]
    storage_transformers: Annotated[Several[Any], Field(max_length=0)] = ()

    @model_validator(mode="after")
    def _layout(self) -> Self:
        chunk = self.chunk_shape
        if chunk[1:] != self.shape[1:] or chunk[0] > self.shape[0]:
            raise ValueError(f"chunk_grid: expected chunks of whole samples of {[*self.shape]}, found {[*chunk]}")
        if self.chunk_bytes >= LARGEST:
            raise ValueError(f"chunk_grid: expected chunks below {LARGEST:,} bytes, found {self.chunk_bytes:,}")
        codecs = [codec["name"] for codec in self.codecs]
        if codecs != ["bytes", "crc32c"] or self.codecs[0].get("configuration", {}).get("endian", "little") != "little":
            raise ValueError(f"codecs: expected bytes (little endian) and crc32c, found {codecs}")
        name = self.chunk_key_encoding["name"]
        separator = self.chunk_key_encoding.get("configuration", {}).get("separator", "/")
        if (name, separator) != ("default", "/"):
            raise ValueError(f"chunk_key_encoding: expected default with /, found {name} with {separator!r}")
        return self

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """Shape of one chunk."""
        return self.chunk_grid["configuration"]["chunk_shape"]

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk with its checksum."""
        return math.prod(self.chunk_shape) * np.dtype(self.data_type).itemsize + 4

    @property
    def chunks(self) -> int:
        """How many chunks there are."""
        return -(-self.shape[0] // self.chunk_shape[0])

    def key(self, path: str, number: int) -> str:
        """The key of a chunk of the array at a path."""
        return f"{path}/c/{'/'.join([str(number)] + ['0'] * (len(self.shape) - 1))}"


class ArrayRecord(Schema):
    """An array's entry in a marker."""

    metadata: ArrayMetadata
    lengths: str
    checksums: str

    @model_validator(mode="after")
    def _chunks(self) -> Self:
        count, size = self.metadata.chunks, self.metadata.chunk_bytes
        lengths, _ = (_words(name, getattr(self, name), count) for name in ("lengths", "checksums"))
        if lengths != size.to_bytes(4, "little") * count:
            raise ValueError(f"lengths: expected {size} bytes, as its shape says, found others")
        return self


def _words(field: str, text: str, count: int) -> bytes:
    """The four bytes of each chunk that a text in base64 keeps."""
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        data = b""
    if len(data) != 4 * count:
        raise ValueError(f"{field}: expected base64 of 4 bytes for each of {count} chunks, found {len(data)} bytes")
    return data


class StoredArray:
    """An array as its entry in a marker describes it; reading opens no `zarr.json`."""

    def __init__(self, objects: ObjectStore, path: str, record: ArrayRecord) -> None:
        self.objects, self.path, self.metadata = objects, path, record.metadata
        self._checksums = base64.b64decode(record.checksums)  # four bytes of each chunk

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole array, `[samples, …]`."""
        return self.metadata.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Little-endian type of the values."""
        kind: np.dtype[Any] = np.dtype(self.metadata.data_type).newbyteorder("<")
        return kind

    @property
    def keys(self) -> list[str]:
        """The chunks' keys in grid order."""
        return [self.metadata.key(self.path, number) for number in range(self.metadata.chunks)]

    @property
    def size(self) -> int:
        """Bytes of its chunks with their checksums."""
        return self.metadata.chunks * self.metadata.chunk_bytes

    def check_chunk(self, number: int) -> None:
        """Compare a chunk with the marker. Errors as `read`."""
        self._fill(number, 0, np.empty((0, *self.shape[1:]), self.dtype))

    def chunk(self, number: int) -> np.ndarray:
        """A chunk's samples, without the padding of the last one. Raises DamageError."""
        size = self.metadata.chunk_shape[0]
        return self.read(number * size, min((number + 1) * size, self.shape[0]))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Samples [start, stop), in memory of their own.

        Raises:
            DamageError: a chunk is missing, of another length, or not the bytes that were written; or there are fewer
                samples.
        """
        if not 0 <= start <= stop <= self.shape[0]:
            where = f"{self.objects.url}/{self.path}"
            raise DamageError(f"{where}: samples {start} to {stop - 1} were asked for, its marker has {self.shape[0]}")
        size = self.metadata.chunk_shape[0]
        values = np.empty((stop - start, *self.shape[1:]), self.dtype)
        for number in range(start // size, -(-stop // size)):
            first, end = max(start, number * size), min(stop, (number + 1) * size)
            self._fill(number, first - number * size, values[first - start : end - start])
        return values

    def _fill(self, number: int, first: int, rows: np.ndarray) -> None:
        """Read samples of a chunk from `first` on into contiguous rows; the whole chunk is compared with the marker.

        What stands before and after them in the chunk goes into memory that is used again and again.
        """
        size = self.metadata.chunk_bytes
        begin = first * (rows[:1].nbytes or 1)
        others = _spare(size - rows.nbytes)  # before, after, checksum
        pieces = [others[:begin], rows.reshape(-1).view(np.uint8), others[begin:-4]]
        key = self.metadata.key(self.path, number)
        try:
            found = self.objects.get_into(key, [*pieces, others[-4:]])
        except FileNotFoundError:
            raise missing(self.objects, key, "a chunk that was written is gone") from None
        damaged = f"{self.objects.url}/{key}: damaged:"
        if found != size:
            raise DamageError(f"{damaged} {found} bytes, {size} were written")
        checksum = functools.reduce(google_crc32c.extend, pieces, 0).to_bytes(4, "little")
        stated, expected = others[-4:].tobytes(), self._checksums[4 * number : 4 * number + 4]
        if not stated == checksum == expected:
            told = f"its checksum is {checksum.hex()} (it says {stated.hex()})"
            raise DamageError(f"{damaged} {told}, {expected.hex()} was written")


class _Memory(threading.local):
    """Memory of a thread that is written over in each read; at most as much as a chunk takes."""

    bytes: np.ndarray = np.empty(0, np.uint8)


_memory = _Memory()


def _spare(size: int) -> np.ndarray:
    """Some bytes of this thread's memory, uint8 `[size]`."""
    if len(_memory.bytes) < size:
        _memory.bytes = np.empty(size, np.uint8)
    return _memory.bytes[:size]
