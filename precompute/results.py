"""What the commands of this room give; their JSON results have these fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from storage.store.codecs import CodecError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from precompute.engine.tasks import Failure, SessionSettings
    from storage.views.policy import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecomputeResult:
    """What a precompute run did."""

    store: str
    bank: str
    targets: list[str]
    shards: list[str]
    views: int
    written: int  # views of a target in a shard
    view_images: int  # that were rendered for them
    invalid: list[str]  # shard and key of images that cannot be decoded
    left_out: Mapping[str, Sequence[str]]  # shard -> what in it makes no sample
    empty: list[str]  # shards without samples
    failures: list[Failure]  # all other shards are complete
    session: SessionSettings
    teacher: Mapping[str, Any]  # what names it
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Amount:
    """Bytes in so many objects."""

    bytes: int
    objects: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MissingAmount(Amount):
    """What is still to be made, and the view images that it takes."""

    view_images: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedAmount(Amount):
    """What all teachers over one bank share, and what of it is still to be made."""

    missing: Amount


class CheaperCodec(CodecError):
    """A codec that takes fewer bytes for all of a target, and what it costs."""

    codec: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTarget:
    """What a target takes, what its codec costs, and cheaper codecs, the smallest error first."""

    target: str
    sample_shape: tuple[int, ...]
    codec: str
    bytes_per_view_image: int
    bytes: int
    error: CodecError | None
    cheaper: list[CheaperCodec]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingReads:
    """What a training reads at some rate."""

    images_per_second: float
    targets_mb_per_second: float
    shards_mb_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """What the engine made in so many seconds, and how fast."""

    seconds: float
    view_images: int
    view_images_per_second: float
    index_seconds_per_image: float
    workers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(Amount):
    """What a precompute run takes."""

    store: str
    bank: str
    policy: Policy
    shards: int
    samples: int
    estimated: int  # shards whose samples are estimated
    views: int
    graph_bytes: int
    missing: MissingAmount
    shared: SharedAmount
    targets: list[PlannedTarget]
    training: TrainingReads
    measured: Throughput | None  # none where nobody asked for hours
    hours: float | None
    warnings: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSum(Amount):
    """What several plans over one store take together."""

    missing: MissingAmount
    hours: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TapOffer:
    """What a tap gives of one view image, in its usual codec."""

    shape: tuple[int, ...]
    codec: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherOffers:
    """What a network of timm can give: tap -> what it takes, and tap -> why precompute would refuse it.

    `layers` and `stages` are those that attention and maps are read of.
    """

    teacher: str
    model: str
    input_size: int
    mean: Sequence[float]
    std: Sequence[float]
    parameters: int
    network: str
    layers: int
    stages: int
    taps: dict[str, TapOffer]
    refused: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphInput:
    """The input of a ready graph."""

    name: str
    shape: list[int | str]
    precision: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphOffers:
    """What a ready graph has: name -> shape of its outputs, and tap -> names of the tensors that could give it."""

    teacher: str
    model: str
    input: GraphInput
    parameters: int
    outputs: dict[str, list[int | str]]
    tensors: dict[str, list[str]]
