"""Bench: what this project promises of speed, each measure against its physical limit, on the user's own machine."""

from __future__ import annotations

import platform
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    import torch
    from dask.system import CPU_COUNT

    from pipeline.bench import learning, reading, recording
    from pipeline.bench.world import TEACHERS, World

    device = _device(device)
    if folder is not None and not folder.is_dir():
        raise UserError(f"--folder {folder}: no such folder; it is where a temporary one is made")
    threads, tf32 = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    torch.set_num_threads(CPU_COUNT)
    torch.backends.cudnn.allow_tf32 = False  # as in the sessions
    temporary = Path(tempfile.mkdtemp(prefix="bench-", dir=folder))
    rows: list[Measure] = []
    try:
        world = World(temporary, expand(shards) if shards else [], device, quick)
        teachers = list(TEACHERS)
        if "precompute" in parts:
            rows += recording.limits(world, teachers, turns, console)
        if "torch" in parts:
            rows += recording.against_torch(world, teachers, turns, console)
        some = slice(0, 1) if quick else slice(None)
        if "train" in parts or "live" in parts:
            cases = list(learning.CASES)[some]
            made = learning.steps(world, cases, turns, "live" in parts, console)
            rows += [row for row in made if row.number == 4 or "train" in parts]
        if "stream" in parts:
            rows += reading.streams(world, list(reading.CASES)[some], 3 * turns, console)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        torch.set_num_threads(threads)  # as the process had them
        torch.backends.cudnn.allow_tf32 = tf32
    return {"machine": _machine(device), "measures": [_plain(row) for row in rows]}


def _device(name: str) -> str:
    """`cpu` or `cuda`. Raises UserError where there is none."""
    import onnxruntime
    import torch

    sessions = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if name == "auto":
        return "cuda" if sessions and torch.cuda.is_available() else "cpu"
    if name == "cuda" and not (sessions and torch.cuda.is_available()):
        missing = "this onnxruntime has no CUDA (extra `gpu`)" if not sessions else "torch sees no CUDA device"
        raise UserError(f"--device cuda: {missing}; use --device cpu")
    return name


def _plain(row: Measure) -> dict[str, Any]:
    ratio = {name: round(value, 4) for name, value in asdict(row.ratio).items()}
    return {**asdict(row), "ratio": ratio, "reached": row.reached}


def _machine(device: str) -> dict[str, Any]:
    """Where it was measured."""
    import onnxruntime
    import torch
    from dask.system import CPU_COUNT

    cuda = device.startswith("cuda")
    return {
        "cores": CPU_COUNT,
        "processor": _processor(),
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
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
            ratio = row["ratio"]
            bar = ""
            if row["bar"] is not None:
                sign, said = "≤" if row["most"] else "≥", "reached" if row["reached"] else "MISSED"
                bar = f"; bar {sign} {row['bar']:g}: {said}"
            spread = f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}] of {row['turns']}"
            text.append(f"  {spread}  {row['case']}{bar}")
            for what, values in row["about"].items():
                several = values.items() if isinstance(values, dict) else [("", values)]
                inner = ", ".join(f"{name} {value}".strip() for name, value in several)
                text.append(f"        {what.replace('_', ' ')}: {inner}")
    return text
