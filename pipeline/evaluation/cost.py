"""What `pipeline evaluate cost` measures: parameters, multiply-adds, forward times of students, links, teachers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.bench.timing import Spread, interleaved, seconds
from pipeline.console import Console
from pipeline.evaluation.common import Said, columns, opened
from precompute.capabilities import bare
from student.distributed import pick_device
from student.evaluation.cost import cost, links_of
from student.run_dir import LOSSES

TURNS = 7


class Contender(NamedTuple):
    """A network with one image as it takes it, `[1, …]`."""

    kind: str
    name: str
    model: nn.Module
    example: Tensor


def measure_cost(paths: Sequence[Path], teachers: Sequence[str], *, batch_size: int, device: str) -> Said:
    """Of the students of runs, of the links that were trained beside them, and of teachers by their names."""
    where, console = pick_device(device), Console()
    contenders: list[Contender] = []
    for path in paths:
        member, _ = opened(path, where, console)
        contenders.append(Contender("student", member.name, member.model, _images(member.about.img_size)))
        for loss, (links, maps) in links_of(path.with_name(LOSSES), member.model).items():
            contenders.append(Contender("links", f"{loss} of {member.name}", links.to(where), maps))
    for name in dict.fromkeys(teachers):
        _, size, network = bare(name, device=str(where))
        contenders.append(Contender("teacher", name, network, _images(size)))
    console.start("timing", (TURNS + 1) * len(contenders))
    try:
        turns = interleaved(
            {str(n): _timed(one, batch_size, where, console) for n, one in enumerate(contenders)}, TURNS
        )
    finally:
        console.stop()
    told = []
    for one, values in zip(contenders, turns.values(), strict=True):
        found, spread = cost(one.model, one.example.to(where)), Spread.of(values)
        told.append({
            "kind": one.kind, "name": one.name, "parameters": found.parameters, "macs": found.macs,
            "flops": 2 * found.macs, "input": list(one.example.shape[1:]),
            "seconds": {"median": spread.median, "low": spread.low, "high": spread.high},
        })  # fmt: skip
    result = {"batch_size": batch_size, "device": str(where), "threads": torch.get_num_threads(), "turns": TURNS,
              "costs": told}  # fmt: skip
    return result, _lines(result)


def _images(size: int) -> Tensor:
    return torch.zeros(1, 3, size, size)


def _timed(one: Contender, batch: int, where: torch.device, console: Console) -> Callable[[], float]:
    """What takes the time of a forward pass of a whole batch."""
    images = torch.randn(batch, *one.example.shape[1:], device=where)

    @torch.inference_mode()
    def forward() -> None:
        one.model(images)
        if where.type == "cuda":
            torch.cuda.synchronize(where)

    def turn() -> float:
        console.advance(1)
        return seconds(forward)

    return turn


def _lines(result: dict[str, Any]) -> list[str]:
    rows = [("", "parameters", "G multiply-adds", "G FLOPs", "ms a batch")]
    rows += [
        (f"{one['kind']} {one['name']}", f"{one['parameters']:,}", f"{one['macs'] / 1e9:.3f}",
         f"{one['flops'] / 1e9:.3f}", f"{1e3 * one['seconds']['median']:.1f}")
        for one in result["costs"]
    ]  # fmt: skip
    return [
        *columns(rows),
        "of one image: multiply-adds of matrix products, convolutions and attention, and twice as many FLOPs; forward "
        f"passes of {result['batch_size']} images on {result['device']} with {result['threads']} thread(s), medians of "
        f"{result['turns']} turns",
    ]
