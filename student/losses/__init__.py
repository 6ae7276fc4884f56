"""Losses: one small module a paper, each with its equation, shapes and reductions.

A module has `need(name, settings, student)` (what it reads from a store, or None) and an `nn.Module`
`Method(name, settings, student, given)` with a `row` for the printed table (or None), called with a `Step`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from precompute.taps import AttentionTaps


@dataclass(frozen=True)
class Step:
    """What a loss sees of one training step.

    Attributes:
        logits: of the student's class head, `[B, K]`.
        labels: int64 `[B]`.
        others: int64 `[B]`, labels of the images that these were mixed with.
        shares: f32 `[B]`, the others' share.
        distilled: logits of the distillation head, `[B, K]`; None for a student without one.
        attention: the student's q and k of this step, where some loss reads them.
        targets: the loss's own targets, decoded, f32 `[B, …]`; empty where it reads none.
        notes: a loss may leave scalars for people here, such as agreement with the teacher.
    """

    logits: Tensor
    labels: Tensor
    others: Tensor
    shares: Tensor
    distilled: Tensor | None = None
    attention: AttentionTaps | None = None
    targets: tuple[Tensor, ...] = ()
    notes: dict[str, Tensor] = field(default_factory=dict)

    def taps(self) -> AttentionTaps:
        """The student's q and k, where they are read."""
        assert self.attention is not None
        return self.attention
