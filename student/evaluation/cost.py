"""What networks cost: parameters, and the multiply-adds of one image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from storage.objects.weights_file import WeightsFile
from student.alignment.student_spec import student_spec

if TYPE_CHECKING:
    from pathlib import Path

MOST = 1024  # patches along a side are far fewer


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Parameters, and multiply-adds of one image. A FLOP count is twice these, as torch counts; papers often do not."""

    parameters: int
    macs: int


def cost(model: nn.Module, example: Tensor) -> Cost:
    """The cost of one forward pass.

    Products of matrices, convolutions and attention are counted; norms, softmax and activations are not.

    Args:
        model: in eval mode.
        example: what it is fed, a batch of one.
    """
    # The counter hooks each tensor that needs a gradient, and fails on a view of a parameter, as PiT's class token is.
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.requires_grad_(False)
        # Attention as products of matrices: the fused kernel of a CPU is not counted.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(example)
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
    parameters = sum(p.numel() for p in model.parameters())
    return Cost(parameters=parameters, macs=counter.get_total_flops() // 2)


def links_of(losses: Path, student: nn.Module) -> dict[str, tuple[nn.Module, Tensor]]:
    """Loss -> AAL's links as a run left them, with maps of one image as they take them.

    Links go from class-row maps `[B, M, P]` to activation maps `[B, C, P]`; P is of the grid that the run used, and of
    the student's own where its file does not say it.

    Args:
        losses: the run's file; no links where it is missing.
        student: of the run.

    Raises:
        UserError: the file cannot be read as weights.
    """
    if not losses.is_file():
        return {}
    by_loss: dict[str, tuple[nn.Module, Tensor]] = {}
    file = WeightsFile(losses)
    for name, weight in file.weights().state.items():
        if name.endswith(".links.weight") and weight.ndim == 3 and weight.shape[2] == 1:
            loss = name.partition(".")[0]
            side = _grid(file.note(loss)) or student_spec(student).grid
            links = nn.Conv1d(weight.shape[1], weight.shape[0], 1).eval()
            by_loss[loss] = links, torch.zeros(1, weight.shape[1], side**2)
    return by_loss


def _grid(note: Any) -> int | None:
    """The side of the maps, as a run wrote it beside its links."""
    side = note.get("grid") if isinstance(note, dict) else None
    return side if isinstance(side, int) and 0 < side < MOST else None
