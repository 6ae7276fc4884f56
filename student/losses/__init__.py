"""Losses: one small module a paper, each with its equation, shapes and reductions.

A module has `need(name, settings, shape)` (what it reads from a store, or None), `align(name, settings, shape,
manifest)` (the printed row) and `Method(settings, shape, manifest)`, called with a `Step`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from precompute.taps import AttentionTaps


@dataclass(frozen=True)
class Step:
    """What a loss sees of one training step.

    Attributes:
        logits: of the student, `[B, K]`.
        labels: int64 `[B]`.
        others: int64 `[B]`, labels of the images that these were mixed with.
        shares: f32 `[B]`, the others' share.
        attention: the student's q and k of this step, where some loss reads them.
        target: the loss's own target, decoded, f32 `[B, …]`; None where it reads none.
    """

    logits: Tensor
    labels: Tensor
    others: Tensor
    shares: Tensor
    attention: AttentionTaps | None = None
    target: Tensor | None = None
