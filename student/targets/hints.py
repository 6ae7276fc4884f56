"""Commands that errors and results propose: `precompute` in the words that it reads back."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import yaml

from storage.errors import call

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def precompute(
    *,
    teacher: str,
    weights: str | None,
    teacher_name: str,
    arguments: Mapping[str, Any],
    mean: Sequence[float],
    std: Sequence[float],
    **settings: object,
) -> str:
    """The command that runs a teacher over shards, as `storage.errors.call` writes it."""
    return call(
        "precompute",
        teacher=teacher,
        weights=weights,
        teacher_name=teacher_name,
        teacher_arg=[f"{name}={argument(value)}" for name, value in arguments.items()],
        mean=_numbers(mean),
        std=_numbers(std),
        **settings,
    )


def argument(value: object) -> str:
    """A value of a teacher's argument, as `precompute` reads it back."""
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("...\n").strip()


def _numbers(values: Sequence[float]) -> str:
    return ",".join(f"{v:g}" if float(f"{v:g}") == v else repr(v) for v in values)
