"""What `fit-teacher` says: its figures, and the command that goes on with the teacher that it made."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from student import commands


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
    words = commands.precompute(
        result["model"], name_of(result["out"]), result["out"], result["arguments"], result["mean"], result["std"],
        result["input_size"], store, shards,
    )  # fmt: skip
    words += ["--view-policy", result["policy"], "--view-size", str(result["view_size"])]
    return shlex.join([*words, "--seed", str(result["view_seed"]), "--target", "logits"])


def name_of(path: str) -> str:
    """What a store may call the teacher in a file."""
    name = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in Path(path).stem)[:40]
    return "fitted_views" if name == "views" else name or "fitted"
