"""Stages of a student without tokens: the modules whose maps timm's `forward_intermediates` gives."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from precompute.taps import stage_maps
from storage.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentStage:
    """A stage of a student.

    Attributes:
        module: gives its map, with the channels first or last, or as tokens; None where no module does.
        width: channels of the map.
        grid: its side.
    """

    module: nn.Module | None
    width: int
    grid: int

    def vectors(self, output: Tensor) -> Tensor:
        """The map as vectors `[B, g², C]`, row by row."""
        if output.ndim == 4:
            first = tuple(output.shape[1:]) == (self.width, self.grid, self.grid)
            return output.flatten(2).transpose(1, 2) if first else output.flatten(1, 2)
        return output


@torch.no_grad()
def student_stages(model: nn.Module, size: int) -> tuple[StudentStage, ...]:
    """The stages of a network, in the order of `forward_intermediates`, whose maps are found in a plain pass.

    Args:
        model: any network; it runs on images that are nowhere alike.
        size: side of its input.

    Raises:
        UserError: it has no such maps.
    """
    kind, shapes = type(model).__name__, stage_maps(model, size)
    if not shapes:
        raise UserError(f"{kind}: timm's forward_intermediates gives no square maps of it")
    parameter, training = next(model.parameters()), model.training
    images = torch.linspace(-1, 1, 3 * size**2).mul(99).sin().view(1, 3, size, size).to(parameter)
    candidates = defaultdict[int, list[tuple[StudentStage, Tensor]]](list)
    calls = Counter[nn.Module]()

    def look(module: nn.Module, _args: Any, output: Any) -> None:
        calls[module] += 1
        for n, (width, side) in enumerate(shapes):
            stage = StudentStage(module=module, width=width, grid=side)
            if module is not model and _gives(stage, output, maps[n]):
                candidates[n].append((stage, output))

    model.eval()
    maps = model.forward_intermediates(images, output_fmt="NCHW", intermediates_only=True)  # type: ignore[operator]
    try:
        with register_module_forward_hook(look):
            model(images)
    finally:
        model.train(training)
    stages = []
    for n, (width, side) in enumerate(shapes):
        # The last: a stage rather than its last layer. What was called again, or changed in place afterwards, is none.
        once = ((s, output) for s, output in reversed(candidates[n]) if s.module is not None and calls[s.module] == 1)
        good = (s for s, output in once if _gives(s, output, maps[n]))
        stages.append(next(good, StudentStage(module=None, width=width, grid=side)))
    return tuple(stages)


def _gives(stage: StudentStage, output: Any, expected: Tensor) -> bool:
    """Whether a module's output is a map `[1, C, g, g]`."""
    if not isinstance(output, Tensor) or output.numel() != expected.numel() or output.ndim not in (3, 4):
        return False
    vectors = stage.vectors(output)
    return vectors.shape[1:] == (stage.grid**2, stage.width) and torch.allclose(
        vectors, expected.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-6
    )
