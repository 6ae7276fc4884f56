"""How the student is computed: precision, attention kernel and compilation, measured on a real batch where asked for.

Which is faster depends on the machine: on a CPU bfloat16 with unfused attention can take a third of the time of f32
with the fused kernel, on a GPU the fused kernel wins.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from storage.errors import UserError
from student import config
from student.lesson import Lesson
from student.stream import Batch

WORTH = 1.2  # another precision than f32 is chosen where it is at least so many times faster
CLEAR = 1.05  # likewise unfused attention, beside noise
ROUNDS = 5
COST = 4  # a run is at least so many times longer than the measuring, or it is not measured
PATIENCE = 30.0  # seconds after which no further round is begun
BACKEND = "inductor"  # of torch.compile

_TYPES = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Choice:
    """What is used, and the milliseconds of a step that were measured for it: `bfloat16 unfused` -> ms."""

    amp: str
    attention: str
    measured: dict[str, float]

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def check(settings: config.Speed, device: torch.device) -> None:
    """Refuse what cannot be, before anything is spent. Raises UserError."""
    if settings.amp == "float16" and device.type != "cuda":
        raise UserError(
            f"speed.amp=float16 needs CUDA (its gradients are scaled), this run is on {device}; "
            "use bfloat16, none or auto"
        )
    if settings.compile and device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++", "cl"))):
        raise UserError(
            "speed.compile: torch.compile needs a C++ compiler and finds none (g++ or clang++); install one"
        )


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The layers of a student that have both a fused and an unfused attention kernel; copied maps need the latter."""
    return [
        module
        for module in model.modules()
        if isinstance(getattr(module, "fused_attn", None), bool) and not getattr(module, "copies_maps", False)
    ]


def apply(lesson: Lesson, amp: str, attention: str) -> None:
    """Compute the student in this way from now on."""
    lesson.precision = _TYPES[amp]
    for module in attention_modules(lesson.student):
        module.fused_attn = attention == "fused"  # type: ignore[assignment]


def compile_student(lesson: Lesson) -> None:
    """Compile the student in place; names in its state dict stay as they are."""
    lesson.student.compile(backend=BACKEND)


def choose(lesson: Lesson, batch: Batch, settings: config.Speed, passes: int) -> Choice:
    """What `auto` stands for, measured by steps on a batch with losses and gradients, and without a trace of them.

    Args:
        lesson: where it will run.
        batch: a real one, on the same device, of the size of one backward pass.
        settings: what is not `auto` stays as it is.
        passes: backward passes of the whole run; for few of them `auto` is f32 with the fused kernel, unmeasured.
    """
    device = batch.images.device
    precisions: list[str] = [settings.amp] if settings.amp != "auto" else ["none", _low(device)]
    kernels: list[str] = [settings.attention]
    if settings.attention == "auto":
        kernels = ["fused", "unfused"] if attention_modules(lesson.student) else ["fused"]
    ways: list[tuple[str, str]] = [(amp, attention) for amp in precisions for attention in kernels]
    if len(ways) == 1 or passes < COST * len(ways) * (ROUNDS + 1):
        return Choice(*ways[0], {})
    with _traceless(lesson, device):
        times = _times(lesson, batch, ways)
    medians = {way: statistics.median(seconds) if seconds else float("inf") for way, seconds in times.items()}
    best = {amp: min(kernels, key=lambda kernel: medians[amp, kernel]) for amp in precisions}
    amp = precisions[0]
    if len(precisions) == 2 and _faster(times[precisions[1], best[precisions[1]]], times[amp, best[amp]], WORTH):
        amp = precisions[1]
    attention = kernels[0]
    if len(kernels) == 2 and _faster(times[amp, "unfused"], times[amp, "fused"], CLEAR):
        attention = "unfused"
    return Choice(amp, attention, {f"{p} {k}": round(1000 * medians[p, k], 3) for p, k in ways if times[p, k]})


def line(choice: Choice, samples: int) -> str:
    """What was chosen, for people, with the figures."""
    kind = "f32" if choice.amp == "none" else choice.amp
    text = f"speed: {kind}, {choice.attention} attention"
    if choice.measured:
        each = ", ".join(f"{name.replace('none', 'f32')} {ms:.3g} ms" for name, ms in choice.measured.items())
        text += f" (measured, a step of {samples}: {each})"
    return text


def _low(device: torch.device) -> str:
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "float16"
    return "bfloat16"


def _faster(ours: list[float], theirs: list[float], times: float) -> bool:
    """Whether a way is so many times faster, by its median and by its best step: a busy machine bends either."""
    if not ours or not theirs:
        return bool(ours)
    return all(of(theirs) >= times * of(ours) for of in (statistics.median, min))


def _times(lesson: Lesson, batch: Batch, ways: list[tuple[str, str]]) -> dict[tuple[str, str], list[float]]:
    """Seconds of some steps each way, in turns; none where it takes too much memory."""
    taken: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
    failed: set[tuple[str, str]] = set()
    began = time.monotonic()
    for round_ in range(ROUNDS + 1):
        for way in ways:
            if way in failed:
                continue
            try:
                seconds = _step(lesson, batch, *way)
            except torch.OutOfMemoryError:
                failed.add(way)
                taken[way].clear()
                continue
            if round_:  # the first is to warm up
                taken[way].append(seconds)
        if round_ and time.monotonic() - began > PATIENCE:
            break
    return taken


def _step(lesson: Lesson, batch: Batch, amp: str, attention: str) -> float:
    apply(lesson, amp, attention)
    cuda = batch.images.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    _, values = lesson(batch)
    lesson.total(values, 0).backward()  # type: ignore[no-untyped-call]
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    lesson.zero_grad(set_to_none=True)
    return seconds


@contextmanager
def _traceless(lesson: Lesson, device: torch.device) -> Iterator[None]:
    """Leaves generators, buffers and settings of a lesson as they were; gradients are None afterwards."""
    kept: Mapping[str, torch.Tensor] = {name: buffer.clone() for name, buffer in lesson.named_buffers()}
    fused = [(module, module.fused_attn) for module in attention_modules(lesson.student)]
    precision = lesson.precision
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for name, buffer in lesson.named_buffers():
                    buffer.copy_(kept[name])
            for module, was in fused:
                module.fused_attn = was
            lesson.precision = precision
            lesson.notes = {}
