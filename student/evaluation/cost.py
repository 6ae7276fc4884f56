"""What networks cost: parameters, and the multiply-adds of one image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from storage.weights import read_weights
from student.speed import attention_modules


@dataclass(frozen=True)
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
    with torch.no_grad(), _countable(model), FlopCounterMode(display=False) as counter:
        model(example)
    return Cost(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2)


@contextmanager
def _countable(model: nn.Module) -> Iterator[None]:
    """Attention as products of matrices: the fused kernel of a CPU is not counted."""
    before = [(module, module.fused_attn) for module in attention_modules(model)]
    try:
        for module, _ in before:
            module.fused_attn = False  # type: ignore[assignment]
        yield
    finally:
        for module, was in before:
            module.fused_attn = was


def links_of(losses: Path) -> dict[str, nn.Module]:
    """Loss -> AAL's links, from class-row maps `[B, M, P]` to activation maps `[B, C, P]`, as a run left them."""
    found: dict[str, nn.Module] = {}
    for name, weight in read_weights(str(losses)).items() if losses.is_file() else ():
        if name.endswith(".links.weight") and weight.ndim == 3 and weight.shape[2] == 1:
            found[name.partition(".")[0]] = nn.Conv1d(weight.shape[1], weight.shape[0], 1).eval()
    return found
