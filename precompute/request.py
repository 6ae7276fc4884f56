"""What a precompute run is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from precompute.engine.dask_client import WORKER_TIMEOUT
from precompute.engine.tasks import OnDecodeError
from precompute.teachers.teacher import Teacher
from storage.views.policy import Policy

if TYPE_CHECKING:
    from precompute.taps.target_spec import TargetSpec


@dataclass(frozen=True)
class PrecomputeRequest:
    """What a run is asked for."""

    shards: Sequence[str]
    teacher: Teacher
    wishes: Sequence[TargetSpec]
    policy: Policy
    given: frozenset[str]  # which of line, size and seed were said
    views: int | None
    new_bank: bool = False
    provider: str = "auto"
    on_decode_error: OnDecodeError = "fail"
    pixels: bool = False  # keep the view images themselves
    workers: int | None = None  # processes on this machine
    dask: str | None = None  # address of a scheduler
    grid: int | None = None  # of activations where a wish says none; None: view size / 16
    worker_timeout: float = WORKER_TIMEOUT  # seconds to wait for workers to start, and to come back
