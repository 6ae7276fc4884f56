"""Attention Transfer: a student that attends as its teacher does, in whole maps, or in its q, k or v.

Li et al., "On the Surprising Effectiveness of Attention Transfer for Vision Transformers", section 2.3, with 1/√d; the
distillation of q is that of section 4.1, its mean squared error the authors' code's. Copying is no loss:
student/attention_copy/copier.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from student.alignment.attention import AttentionAligner
from student.alignment.student_spec import StudentSpec
from student.alignment.student_taps import StudentTap
from student.alignment.tokens import TokenAligner
from student.losses.base import LossInputs
from student.settings import AlignedLossConfig, AttentionTensors, Average, require_maps, setting
from student.targets.requirement import TargetRequirement, taps_of
from student.targets.stored_target import StoredTarget


def distillation(student: Tensor, teacher: Tensor, heads: Literal["mean", "sum"] = "mean") -> Tensor:
    """−Σ_j A^t_ij log A^s_ij, mean over batch and queries i, summed over layers; over heads the mean or the sum.

    Heads are averaged by default, as in the authors' code, with which λ = 3 was published; the paper prints the sum.

    Args:
        student: logarithms of rows, `[B, L, H, Q, N]`.
        teacher: rows that sum to one, likewise.
        heads: how heads are reduced.
    """
    entropy = -(teacher * student).sum(-1)  # [B, L, H, Q]
    by_head = entropy.mean((0, 3))
    reduced = by_head.mean(1) if heads == "mean" else by_head.sum(1)
    return reduced.sum()


def squares(student: Tensor, teacher: Tensor) -> Tensor:
    """(x^s − x^t)², mean over batch, heads, tokens and width, summed over layers.

    Args:
        student: `[B, L, …]`, such as queries `[B, L, H, N, d]`.
        teacher: likewise.
    """
    return (student - teacher).square().flatten(2).mean((0, 2)).sum()


class Settings(AlignedLossConfig):
    """Attention distillation: of maps, or of what makes them."""

    type: Literal["attention"] = "attention"
    tensors: AttentionTensors = "map"
    average: Average = "none"
    reduce_heads: Literal["mean", "sum"] = "mean"

    @model_validator(mode="after")
    def _of_maps(self) -> Settings:
        require_maps(self.tensors, average=self.average != "none", reduce_heads=self.reduce_heads != "mean")
        return self


def reads(settings: Settings) -> frozenset[StudentTap]:
    """The student's attention, or its values."""
    return frozenset({"values" if settings.tensors == "v" else "attention"})


def need(name: str, settings: Settings, student: StudentSpec) -> TargetRequirement:
    """Whole attention maps or what gives them, or vectors."""
    return TargetRequirement(name, taps_of(settings.tensors), settings.teacher, settings.target)


class Method(nn.Module):
    """Attention distillation as a term of the training loss."""

    def __init__(self, name: str, settings: Settings, student: StudentSpec, given: Sequence[StoredTarget]) -> None:
        super().__init__()
        self.tensors, self.reduce_heads = settings.tensors, settings.reduce_heads
        self.rows: AttentionAligner | None = None
        self.vectors: TokenAligner | None = None
        if settings.tensors == "map":
            self.rows = AttentionAligner(name, settings, student, given, "all", settings.average)
            self.row = self.rows.row
        else:
            self.vectors = TokenAligner(name, settings, student, given)
            self.vectors.require_width(f"compare maps: --set {setting(name)}.tensors=map")
            self.row = self.vectors.row

    def forward(self, step: LossInputs) -> Tensor:
        """The loss of one step."""
        seen = step.student
        if self.rows is not None:
            mine = self.rows.student_logs(seen.q, seen.k, seen.scales)
            return distillation(mine, self.rows.teacher_rows(step.targets), self.reduce_heads)
        assert self.vectors is not None
        parts = [
            squares(self.vectors.student_vectors(getattr(seen, tap)), self.vectors.teacher_vectors(target))
            for tap, target in zip(self.tensors, step.targets, strict=True)
        ]
        return torch.stack(parts).sum()
