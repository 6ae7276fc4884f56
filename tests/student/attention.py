"""Attention as losses read it, of tensors at hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from precompute.taps import Attention, AttentionTaps, attention_layers, image_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn


def attention_of(
    q: Sequence[Tensor], k: Sequence[Tensor], scales: Sequence[float], v: Sequence[Tensor] | None = None
) -> list[Attention]:
    """One layer for each of the queries."""
    values: Sequence[Tensor | None] = v or [None] * len(q)
    return [Attention(q=a, k=b, v=c, scale=s) for a, b, c, s in zip(q, k, values, scales, strict=True)]


def taps_of(model: nn.Module) -> AttentionTaps:
    """Taps of all attention layers of a student, PiT included."""
    return AttentionTaps(attention_layers(model, image_size(model), pooled=True).layers)
