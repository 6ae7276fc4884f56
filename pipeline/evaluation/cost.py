"""What `pipeline evaluate cost` measures and prints: parameters, multiply-adds, forward times."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.bench.timing import Spread, interleaved, seconds
from pipeline.evaluation.common import columns, open_student, progress
from precompute.capabilities import bare
from student.distributed import pick_device
from student.evaluation.cost import cost, links_of
from student.run_dir import LOSSES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

TURNS = 7


class Contender(NamedTuple):
    """A network with one image as it takes it, `[1, …]`."""

    kind: str
    name: str
    model: nn.Module
    example: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkCost:
    """What a network costs.

    Attributes:
        kind: student, links or teacher.
        name: of the network.
        parameters: how many.
        macs: multiply-adds of one image.
        flops: twice as many.
        input: shape of one image as it takes it.
        seconds: of a forward pass of a batch, over all turns.
    """

    kind: str
    name: str
    parameters: int
    macs: int
    flops: int
    input: tuple[int, ...]
    seconds: Spread


@dataclass(frozen=True, slots=True, kw_only=True)
class CostReport:
    """What networks cost, and how forward passes were timed."""

    batch_size: int
    device: str
    threads: int
    turns: int
    costs: tuple[NetworkCost, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def lines(self) -> list[str]:
        """A table with a row for each network."""
        rows = [("", "parameters", "G multiply-adds", "G FLOPs", "ms a batch")]
        for one in self.costs:
            numbers = (f"{one.macs / 1e9:.3f}", f"{one.flops / 1e9:.3f}", f"{1e3 * one.seconds.median:.1f}")
            rows.append((f"{one.kind} {one.name}", f"{one.parameters:,}", *numbers))
        return [
            *columns(rows),
            "of one image: multiply-adds of matrix products, convolutions and attention, and twice as many FLOPs; "
            f"forward passes of {self.batch_size} images on {self.device} with {self.threads} thread(s), medians of "
            f"{self.turns} turns",
        ]


def measure_cost(paths: Sequence[Path], teachers: Sequence[str], *, batch_size: int, device: str) -> CostReport:
    """Costs of the students of runs, of the links that were trained beside them, and of teachers by their names."""
    torch_device = pick_device(device)
    contenders: list[Contender] = []
    for path in paths:
        member, _ = open_student(path, torch_device)
        size = member.about.img_size
        contenders.append(Contender("student", member.name, member.model, torch.zeros(1, 3, size, size)))
        for loss, (links, maps) in links_of(path.with_name(LOSSES), member.model).items():
            contenders.append(Contender("links", f"{loss} of {member.name}", links.to(torch_device), maps))
    for name in dict.fromkeys(teachers):
        _, size, network = bare(name, device=str(torch_device))
        contenders.append(Contender("teacher", name, network, torch.zeros(1, 3, size, size)))
    with progress("timing", (TURNS + 1) * len(contenders)) as advance:
        timed = {str(n): _timed(one, batch_size, torch_device, advance) for n, one in enumerate(contenders)}
        turns = interleaved(timed, TURNS)
    costs = tuple(_cost(one, times, torch_device) for one, times in zip(contenders, turns.values(), strict=True))
    threads = torch.get_num_threads()
    return CostReport(batch_size=batch_size, device=str(torch_device), threads=threads, turns=TURNS, costs=costs)


def _cost(one: Contender, times: Sequence[float], device: torch.device) -> NetworkCost:
    counted, input_shape = cost(one.model, one.example.to(device)), tuple(one.example.shape[1:])
    numbers = {"parameters": counted.parameters, "macs": counted.macs, "flops": 2 * counted.macs}
    return NetworkCost(kind=one.kind, name=one.name, input=input_shape, seconds=Spread.of(times), **numbers)


def _timed(one: Contender, count: int, device: torch.device, advance: Callable[[int], None]) -> Callable[[], float]:
    """What takes the time of a forward pass of a whole batch."""
    images = torch.randn(count, *one.example.shape[1:], device=device)

    @torch.inference_mode()
    def forward() -> None:
        one.model(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def turn() -> float:
        advance(1)
        return seconds(forward)

    return turn
