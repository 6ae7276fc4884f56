"""What a precompute run is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from precompute.engine.dask_client import WORKER_TIMEOUT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from precompute.engine.tasks import OnDecodeError
    from precompute.taps.target_spec import TargetSpec
    from precompute.teachers.teacher import Teacher
    from storage.views.policy import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecomputeRequest:
    """What a precompute run is asked for.

    Attributes:
        shards: patterns of shards, such as `train-{000000..000009}.tar`.
        teacher: the network, from `find_teacher`.
        targets: what is kept of the teacher; none for its usual targets.
        policy: what the views are drawn from.
        policy_fields: which of `line`, `size` and `seed` of the policy count; the others come from the bank that the
            store already has for these shards.
        num_views: views of each image; None for as many as the bank has, else four.
        new_bank: make another bank where the shards already have one of another policy.
        provider: where the teacher runs: `auto`, `cpu` or `cuda`.
        on_decode_error: whether an image that cannot be decoded fails its shard or is skipped in training.
        store_views: keep the view images too.
        workers: worker processes on this machine; None for this process alone.
        dask: address of a running dask scheduler.
        grid: side of activations where a target says none; None for view size / 16.
        known_targets: ids of targets that the planned store has, in a plan, which records elsewhere.
        worker_timeout: seconds to wait for workers to start and to come back.
    """

    shards: str | Sequence[str]
    teacher: Teacher
    targets: Sequence[TargetSpec] = ()
    policy: Policy
    policy_fields: frozenset[str] = frozenset({"line", "size", "seed"})
    num_views: int | None = None
    new_bank: bool = False
    provider: str = "auto"
    on_decode_error: OnDecodeError = "fail"
    store_views: bool = False
    workers: int | None = None
    dask: str | None = None
    grid: int | None = None
    known_targets: frozenset[str] = frozenset()
    worker_timeout: float = WORKER_TIMEOUT
