"""Attempts: the arrays that one try writes, which count only once a marker names them."""

from __future__ import annotations

import contextlib
import uuid
from dataclasses import asdict
from typing import TYPE_CHECKING

from storage.errors import UserError
from storage.objects import json_record
from storage.store.arrays import ArrayRecord, ArrayWriter
from storage.store.codecs import ArraySpec
from storage.store.markers import FORMAT, Marker, Task
from storage.views.view import COLUMNS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from storage.store.store import Store


class Attempt:
    """One try at one task: arrays below a name that nobody else uses, until `commit` makes them count."""

    def __init__(self, store: Store, task: Task, samples: int) -> None:
        self._store, self.task, self._samples = store, task, samples
        self.name = uuid.uuid4().hex[:16]
        self.arrays: dict[str, ArrayWriter] = {}
        self.entries: dict[str, ArrayRecord] = {}  # what `commit` said of each array

    def array(self, name: str, sample_shape: tuple[int, ...], dtype: str, axes: Sequence[str]) -> ArrayWriter:
        """A new array `[samples, *sample_shape]` of this attempt."""
        attributes = {"id": self.task.id, "shard": self.task.shard, "view": self.task.view}
        if self.task.kind == "bank":
            attributes["columns"] = list(COLUMNS) if name == "parameters" else ["crc32c"]
        path, spec = f"{self.task.folder}/{self.name}/{name}", ArraySpec(dtype, sample_shape, tuple(axes))
        self.arrays[name] = ArrayWriter(self._store.objects, path, self._samples, spec, attributes)
        return self.arrays[name]

    def commit(self, content: json_record.Record) -> Marker:
        """Make this attempt count, unless another one does already: the marker that counts."""
        self.entries = {name: writer.finish() for name, writer in self.arrays.items()}
        arrays = {name: entry.plain() for name, entry in self.entries.items()}
        record = {"format": FORMAT, "attempt": self.name, "arrays": arrays, **asdict(self.task), **content}
        self._store.objects.create(f"done/{self.task.name}", json_record.to_json(record))
        marker = self._store.marker(self.task)
        if marker.record.attempt != self.name:  # somebody else was first; who comes second yields
            self.abandon()
        return marker

    def abandon(self) -> None:
        """Remove what was written, unless it counts: a commit may have left its marker and failed after that."""
        with contextlib.suppress(UserError):
            if self._store.marker(self.task).record.attempt == self.name:
                return
        self._store.objects.remove(f"{self.task.folder}/{self.name}")
