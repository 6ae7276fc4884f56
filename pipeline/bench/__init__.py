"""Bench: what this project promises of speed, each measure against its physical limit, on the user's own machine."""

from __future__ import annotations

import platform
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from storage.errors import UserError
from storage.shards.patterns import expand

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.bench.timing import Measure
    from pipeline.console import Console

PARTS = ("precompute", "torch", "train", "live", "stream")


def bench(
    parts: Sequence[str],
    shards: Sequence[str],
    console: Console,
    *,
    device: str = "auto",
    turns: int = 5,
    quick: bool = False,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Measure speed; the results as plain data.

    Args:
        parts: of `PARTS`.
        shards: photographs for `precompute` and `torch`; synthetic ones where none are given.
        console: told what goes on.
        device: `cpu` or `cuda`, of PyTorch and of the teachers' sessions; `auto` is cuda where both have it.
        turns: of each contender.
        quick: small cases alone.
        folder: where a temporary one is made; its disk is measured too.

    Raises:
        UserError: no such folder, or as the parts do.
    """
    from dask.system import CPU_COUNT

    from pipeline.bench import learning, reading, recording
    from pipeline.bench.world import World

    device = _device(device)
    if folder is not None and not folder.is_dir():
        raise UserError(f"--folder {folder}: no such folder; it is where a temporary one is made")
    threads, tf32 = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    torch.set_num_threads(CPU_COUNT)
    torch.backends.cudnn.allow_tf32 = False  # as in the sessions
    rows: list[Measure] = []
    try:
        with tempfile.TemporaryDirectory(prefix="bench-", dir=folder, ignore_cleanup_errors=True) as temporary:
            world = World(Path(temporary), expand(shards) if shards else [], device, quick)
            if "precompute" in parts:
                rows += recording.limits(world, turns, console)
            if "torch" in parts:
                rows += recording.against_torch(world, turns, console)
            if "train" in parts or "live" in parts:
                steps = learning.steps(world, turns, "live" in parts, console)
                rows += [row for row in steps if row.number == 4 or "train" in parts]
            if "stream" in parts:
                rows += reading.streams(world, 3 * turns, console)
    finally:
        torch.set_num_threads(threads)  # as the process had them
        torch.backends.cudnn.allow_tf32 = tf32
    return {"machine": _machine(device), "measures": [_plain(row) for row in rows]}


def _device(name: str) -> str:
    """`cpu` or `cuda`. Raises UserError where there is none."""
    import onnxruntime

    sessions = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    usable = sessions and torch.cuda.is_available()
    if name == "auto":
        return "cuda" if usable else "cpu"
    if name == "cuda" and not usable:
        missing = "this onnxruntime has no CUDA (extra `gpu`)" if not sessions else "torch sees no CUDA device"
        raise UserError(f"--device cuda: {missing}; use --device cpu")
    return name


def _plain(row: Measure) -> dict[str, Any]:
    ratio = {name: round(value, 4) for name, value in asdict(row.ratio).items()}
    return {**asdict(row), "ratio": ratio, "reached": row.reached}


def _machine(device: str) -> dict[str, Any]:
    """Where it was measured."""
    import onnxruntime
    from dask.system import CPU_COUNT

    return {
        "cores": CPU_COUNT,
        "processor": _processor(),
        "device": torch.cuda.get_device_name(device) if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


def _processor() -> str:
    """The processor's name, as well as it is known."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def lines(result: dict[str, Any]) -> list[str]:
    """The figures, human-readable."""
    machine = result["machine"]
    text = [
        f"{machine['processor']}, {machine['cores']} cores, {machine['device']}; torch {machine['torch']}, "
        f"onnxruntime {machine['onnxruntime']}; medians of turns, quartiles in brackets"
    ]
    for words in dict.fromkeys(row["words"] for row in result["measures"]):
        rows = [row for row in result["measures"] if row["words"] == words]
        text += ["", f"({rows[0]['number']}) {words}"]
        for row in rows:
            ratio, bar = row["ratio"], ""
            if row["bar"] is not None:
                sign, verdict = "≤" if row["most"] else "≥", "reached" if row["reached"] else "MISSED"
                bar = f"; bar {sign} {row['bar']:g}: {verdict}"
            spread = f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}] of {row['turns']}"
            text.append(f"  {spread}  {row['case']}{bar}")
            for what, values in row["about"].items():
                if isinstance(values, dict):
                    values = ", ".join(f"{name} {value}" for name, value in values.items())
                text.append(f"        {what.replace('_', ' ')}: {values}")
    return text
