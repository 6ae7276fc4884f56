"""Commands that errors and results propose: `pipeline precompute` in the words that it reads back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import yaml


def precompute(
    model: str,
    *,
    teacher_name: str,
    weights: str | None,
    arguments: Mapping[str, Any],
    mean: Sequence[float],
    std: Sequence[float],
    input_size: int,
    store: str,
    shards: Sequence[str],
) -> list[str]:
    """The words that name a teacher, a store and shards; views and targets are still to be said."""
    words = ["pipeline", "precompute", "--teacher", model, *(["--weights", weights] if weights else [])]
    words += ["--teacher-name", teacher_name]
    for name, value in arguments.items():
        words += ["--teacher-arg", f"{name}={flag(value)}"]
    words += ["--mean", _numbers(mean), "--std", _numbers(std), "--input-size", str(input_size), "--store", store]
    return [*words, *(word for pattern in shards for word in ("--shards", pattern))]


def flag(value: object) -> str:
    """A value as `--teacher-arg` reads it back."""
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("...\n").strip()


def _numbers(values: Sequence[float]) -> str:
    return ",".join(f"{v:g}" if float(f"{v:g}") == v else repr(v) for v in values)
