"""Markers: what makes one attempt at one task count, and what it wrote.

A task is one view of one shard in a bank or a target. An attempt writes arrays under a name that nobody else uses; its
marker, created only if absent, names them with the length and checksum of every chunk.
"""

from __future__ import annotations

import re
from dataclasses import astuple, dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from storage.errors import DamageError
from storage.objects import json_record, record_schema
from storage.objects.object_store import ObjectStore
from storage.objects.record_schema import MOST_SAMPLES, Id, Schema, Several, Sha256, SummaryRecord
from storage.store.arrays import ArrayRecord, StoredArray
from storage.store.codecs import Codec
from storage.views.view import COLUMNS

FORMAT: Literal[1] = 1

Kind = Literal["bank", "target"]


@dataclass(frozen=True, slots=True, order=True)
class Task:
    """What a marker speaks of: one view of one shard in a bank or a target."""

    kind: Kind
    id: str
    shard: str
    view: int

    @property
    def name(self) -> str:
        """The marker's name."""
        return f"{self.kind}.{self.id}.{self.shard}.{self.view}.json"

    @property
    def folder(self) -> str:
        """Where the attempts lie."""
        return f"{self.kind}s/{self.id}/{self.shard}/{self.view}"

    @classmethod
    def named(cls, name: str) -> Task | None:
        """The task that a marker's name says, or None."""
        match = re.fullmatch(r"(bank|target)\.([^.]+)\.([^.]+)\.(\d+)\.json", name)
        return cls(match[1], match[2], match[3], int(match[4])) if match else None  # type: ignore[arg-type]


_Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]{1,100}$")]


class MarkerRecord(Schema):
    """What all markers say."""

    format: Literal[1]
    id: Id
    shard: Id
    view: Annotated[int, Field(ge=0)]
    attempt: _Name
    arrays: Annotated[dict[_Name, ArrayRecord], Field(min_length=1)]

    @model_validator(mode="after")
    def _samples(self) -> Self:
        counts = {array.metadata.shape[0] for array in self.arrays.values()}
        if len(counts) > 1:
            raise ValueError(f"arrays: expected as many samples in each, found {sorted(counts)}")
        return self


class BankMarkerRecord(MarkerRecord):
    """A bank's marker."""

    kind: Literal["bank"]
    summary: SummaryRecord
    invalid: Several[Annotated[int, Field(ge=0, lt=MOST_SAMPLES)]]
    renderer: dict[str, str]

    @property
    def views_digest(self) -> str:
        """Digest of what its views are, whichever attempt wrote them. Targets name it."""
        checksums = {name: array.checksums for name, array in self.arrays.items()}
        return json_record.digest_of([self.summary.plain(), self.invalid, checksums])

    @model_validator(mode="after")
    def _bank(self) -> Self:
        samples = self.summary.samples
        if self.summary.id != self.shard:
            raise ValueError(f"summary.id: expected {self.shard}, found {self.summary.id}")
        arrays = {name: (array.metadata.data_type, array.metadata.shape) for name, array in self.arrays.items()}
        expected = {"parameters": ("float64", (samples, len(COLUMNS))), "signatures": ("uint32", (samples, 1))}
        if arrays != expected:
            raise ValueError(f"arrays: expected {expected}, found {arrays}")
        if self.invalid and max(self.invalid) >= samples:
            raise ValueError(f"invalid: expected samples below {samples}, found {max(self.invalid)}")
        return self


class TargetMarkerRecord(MarkerRecord):
    """A target's marker."""

    kind: Literal["target"]
    bank_views: Sha256
    made: dict[str, Any] = Field(default_factory=dict)


_MARKERS: dict[str, type[MarkerRecord]] = {"bank": BankMarkerRecord, "target": TargetMarkerRecord}

RECOMPUTE = "Run the same precompute command again to recompute it."


class Marker:
    """What one attempt wrote, and that it counts.

    Args:
        objects: where its arrays lie.
        task: whose marker it is.
        data: the marker's bytes.

    Raises:
        DamageError: they are damaged, or another task's marker.
        UserError: a newer version wrote it.
    """

    def __init__(self, objects: ObjectStore, task: Task, data: bytes) -> None:
        self.task, self.name = task, f"{objects.url}/done/{task.name}"
        content = json_record.from_json(data, self.name)
        stated = tuple(map(content.get, ("kind", "id", "shard", "view")))
        if stated != astuple(task):
            raise DamageError(f"{self.name}: damaged: it is the marker of {'.'.join(map(str, stated))}")
        record_schema.require_format(content, self.name)
        self.record = record_schema.checked(_MARKERS[task.kind], content, self.name, RECOMPUTE)
        self.folder = f"{task.folder}/{self.record.attempt}"
        records = self.record.arrays
        self.arrays = {name: StoredArray(objects, f"{self.folder}/{name}", records[name]) for name in records}

    @property
    def bank(self) -> BankMarkerRecord:
        """What the marker of a bank's view says."""
        assert isinstance(self.record, BankMarkerRecord)
        return self.record

    @property
    def target(self) -> TargetMarkerRecord:
        """What the marker of a target's view says."""
        assert isinstance(self.record, TargetMarkerRecord)
        return self.record

    @property
    def samples(self) -> int:
        """How many samples each of its arrays has."""
        return next(iter(self.arrays.values())).shape[0]

    def require(self, samples: int, codec: Codec | None = None) -> None:
        """Compare with what other records say.

        Args:
            samples: of the shard.
            codec: of a marker of a target.

        Raises:
            DamageError: other samples, or other arrays than the codec makes.
        """
        wrong = f"arrays: expected {samples} samples, found {self.samples}" if self.samples != samples else ""
        if codec is not None:
            arrays = {name: (array.dtype.name, array.shape[1:]) for name, array in self.arrays.items()}
            layouts = [codec.layout(), codec.layout(wide=True)]
            expected = [{name: (part.dtype, part.shape) for name, part in layout.items()} for layout in layouts]
            if arrays not in expected:
                wrong = f"arrays: expected {expected[0]}, as the target's manifest says, found {arrays}"
        if wrong:
            raise DamageError(f"{self.name}: damaged: {wrong}", hint=RECOMPUTE)
