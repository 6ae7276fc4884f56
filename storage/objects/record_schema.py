"""What records look like: types and bounds that are checked before anything is allocated or looped over.

A record's digest tells damage apart, not malice: anybody can make one. Records are read by `checked`, which says what
is wrong in the words of all other errors, and used as the models that it gives.
"""

from __future__ import annotations

import reprlib
from dataclasses import fields
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError, WrapValidator, model_validator

from storage.errors import DamageError, UserError
from storage.objects.json_record import Record

MOST_SAMPLES = 100_000_000  # in one shard: its tar has 100 GB at least
MOST = 1_000_000  # layers, channels, tokens, classes: more than any network has
LARGEST = 1 << 32  # bytes of a chunk: its length is kept in 32 bits
_HEADER = 512  # bytes of a tar for each sample, at least


class Schema(BaseModel):
    """A record or a part of one. Fields that a later version adds are kept and not looked at."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="allow", populate_by_name=True, allow_inf_nan=False, defer_build=True
    )

    def plain(self) -> Record:
        """What JSON says of it: all that was read or given, and no default."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)


def plain(result: Any) -> Any:
    """What JSON says of a record or a data class: `default` of `json.dumps`."""
    return result.plain() if isinstance(result, Schema) else {f.name: getattr(result, f.name) for f in fields(result)}


T = TypeVar("T")
M = TypeVar("M", bound=Schema)
Several = Annotated[tuple[T, ...], Strict(False)]  # JSON has lists alone
Count = Annotated[int, Field(ge=0, le=MOST)]
Size = Annotated[int, Field(ge=1, le=MOST)]
Offset = Annotated[int, Field(ge=0, lt=1 << 63)]
Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,250}$")]  # safe as a part of a path
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_AsWritten = WrapValidator(lambda values, check: tuple(values) if check(values) else ())  # 0 is hashed as 0, not 0.0
Three = Annotated[tuple[float, float, float], Strict(False), _AsWritten]
Range = Annotated[tuple[Offset, Offset, Sha256], Strict(False)]  # start, stop and sha256 of these bytes


def checked(model: type[M], content: Record, name: str, hint: str) -> M:
    """A record's content as its model.

    Args:
        model: what it should be.
        content: what it is.
        name: what errors call it.
        hint: what to do, a line.

    Raises:
        DamageError: naming the first field that is wrong, what was expected and what was found.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise DamageError(f"{name}: damaged: {_explained(problem)}", hint=hint) from None


def require_format(content: Record, name: str) -> None:
    """UserError where a newer version wrote a record."""
    version = content.get("format")
    if isinstance(version, int) and version > 1:
        message = f"{name}: format {reprlib.repr(version)}, this version reads 1"
        raise UserError(message, hint="Install a newer version of this package.")


def _explained(problem: Any) -> str:
    """One of pydantic's problems: the field with dots, what was expected, what was found."""
    field = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "value_error":  # of our own, which begins with a field
        return ".".join(part for part in (field, str(problem["ctx"]["error"])) if part)
    if problem["type"] == "missing":
        return f"{field}: expected a value, found nothing"
    expected = str(problem["msg"]).replace("Input should be", "expected").replace("String should", "expected text to")
    return f"{field}: {expected}, found {reprlib.repr(problem['input'])}"


class SummaryRecord(Schema):
    """What is enough to recognize a shard without reading it: in its index, and in every marker of a bank.

    `first` and `last` are (start, stop, sha256) of the bytes of the first and the last block.
    """

    id: Id
    stem: str
    bytes: Offset
    samples: Annotated[int, Field(ge=0, le=MOST_SAMPLES)]
    labelled: bool
    first: Range
    last: Range

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        if self.samples * _HEADER > self.bytes:
            raise ValueError(f"samples: expected at most one for {_HEADER} of {self.bytes} bytes, found {self.samples}")
        for name, (start, stop, _) in (("first", self.first), ("last", self.last)):
            if not start <= stop <= self.bytes or (start == stop and self.samples):
                raise ValueError(f"{name}: expected a range within {self.bytes} bytes, found {start} to {stop}")
        return self


class IndexRecord(SummaryRecord):
    """The index of a shard: see `storage.shards.index.ShardIndex`."""

    format: Literal[1]
    kind: Literal["index"]
    block: Literal[64]
    keys: Several[str]
    digests: Several[Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]]
    labels: Several[Annotated[int, Field(ge=0, lt=1_000_000_000)] | None]
    starts: Several[Offset]
    left_out: Several[str] = ()

    @model_validator(mode="after")
    def _columns(self) -> Self:
        columns = {"keys": self.keys, "digests": self.digests, "labels": self.labels, "starts": self.starts[1:]}
        for name, column in columns.items():
            if len(column) != self.samples:
                raise ValueError(f"{name}: expected one for each of {self.samples} samples, found {len(column)}")
        ends = (*self.starts[1:], self.bytes + 1)
        wrong = next((i for i, (a, b) in enumerate(zip(self.starts, ends, strict=True)) if a >= b), None)
        if wrong is not None:
            raise ValueError(f"starts.{wrong}: expected below {ends[wrong]}, found {self.starts[wrong]}")
        if self.labelled != (None not in self.labels):
            raise ValueError(f"labelled: expected {not self.labelled}, as its labels say, found {self.labelled}")
        if len(set(self.keys)) < self.samples:
            raise ValueError("keys: expected each once, found one twice")
        return self
