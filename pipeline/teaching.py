"""What `fit-teacher` says: its figures, and the command that goes on with the teacher that it made."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Any

import yaml


def lines(result: dict[str, Any]) -> list[str]:
    """The result for people."""
    top5 = f", top-5 {result['top5']:.2f} %" if result["top5"] is not None else ""
    return [
        f"top-1 {result['top1']:.2f} %{top5} on {result['samples']} samples: {result['out']}",
        "its logits can be kept like any other teacher's:",
        f"  {result['command']}",
    ]


def command(result: dict[str, Any], store: str, shards: tuple[str, ...]) -> str:
    """The `pipeline precompute` that keeps the logits of a teacher over the shards and views that it was fitted on."""
    words: list[object] = ["pipeline", "precompute", "--teacher", result["model"], "--weights", result["out"]]
    words += ["--as", name_of(result["out"])]
    for name, value in result["arguments"].items():
        words += ["--teacher-arg", f"{name}={flag(value)}"]
    words += ["--mean", _numbers(result["mean"]), "--std", _numbers(result["std"])]
    words += ["--input-size", result["input_size"], "--store", store]
    for pattern in shards:
        words += ["--shards", pattern]
    words += ["--view-policy", result["policy"], "--view-size", result["view_size"], "--seed", result["view_seed"]]
    return shlex.join(str(word) for word in [*words, "--target", "logits"])


def name_of(path: str) -> str:
    """What a store may call the teacher in a file."""
    name = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in Path(path).stem)[:40]
    return "fitted_views" if name == "views" else name or "fitted"


def flag(value: object) -> str:
    """A value as `--teacher-arg` reads it back."""
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("...\n").strip()


def _numbers(values: list[float]) -> str:
    return ",".join(f"{v:g}" if float(f"{v:g}") == v else repr(v) for v in values)
