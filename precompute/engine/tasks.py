"""What a worker is handed and what it gives back: plain data, which any process anywhere can take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypedDict

if TYPE_CHECKING:
    from storage.shards.shard import Shard
    from storage.store.codecs import Codec
    from storage.store.manifests import TargetManifest
    from storage.store.store import Store
    from storage.views.policy import Policy

OnDecodeError = Literal["fail", "skip"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetOutput:
    """A target, and which of the graph's outputs makes it; None where it is the view images themselves."""

    target: str
    position: int | None
    codec: Codec

    @classmethod
    def of(cls, manifest: TargetManifest) -> TargetOutput:
        """From a target's manifest."""
        return cls(target=manifest.id, position=manifest.output, codec=manifest.codec)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTask:
    """One shard and one graph, with all targets of it that are wanted: plain data.

    Attributes:
        store: where everything is kept.
        url: of the shard.
        policy: of the bank.
        teacher: name of the teacher, for messages.
        graph: digest of the teacher's graph.
        outputs: the targets.
        views: how many, from 0.
        on_decode_error: whether an image that cannot be decoded, or a key without one, fails the shard or is skipped.
        known: ids of shards with the file's stem that the store knew when the run began.
        shard: the shard, where it was opened already.
    """

    store: Store
    url: str
    policy: Policy
    teacher: str
    graph: str
    outputs: tuple[TargetOutput, ...]
    views: int
    on_decode_error: OnDecodeError = "fail"
    known: tuple[str, ...] = ()
    shard: Shard | None = None


class SessionSettings(TypedDict, total=False):
    """What a session runs on; empty where none ran."""

    onnxruntime: str
    provider: str
    precision: str
    optimisation: str
    tf32: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a task.

    Attributes:
        shard: that was computed.
        written: how many (target, view) pairs.
        rendered: view images that the task had to make.
        invalid: keys of images that cannot be decoded.
        settings: of the session.
        left_out: why each key that makes no sample makes none.
    """

    shard: Shard
    written: int = 0
    rendered: int = 0
    invalid: tuple[str, ...] = ()
    settings: SessionSettings = field(default_factory=SessionSettings, hash=False)
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A shard that could not be made. `kind`: of its data, of input and output, of a worker that died, or a bug."""

    shard: str
    error: str
    kind: Literal["data", "io", "worker", "bug"]


# Told (view images done so far, those of the whole task) while it goes on; may raise to stop it.
ReportProgress = Callable[[int, int], None]

Outcomes = Iterator[tuple[str, Outcome | Failure]]  # url of a shard, and what became of its task
