"""Attention Transfer: a student that attends as its teacher does, in whole maps, or in its q, k or v.

Li et al., "On the Surprising Effectiveness of Attention Transfer for Vision Transformers", section 2.3, with 1/√d; the
distillation of q is that of section 4.1, its mean squared error the authors' code's. Copying is no loss:
student/attention_copy/copier.py.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor

from storage.errors import setting
from student.alignment.attention import AttentionAligner
from student.alignment.student_spec import StudentSpec
from student.alignment.student_taps import StudentTap
from student.alignment.tokens import TokenAligner
from student.losses.base import Loss, LossInputs
from student.settings import AlignedLossConfig, AttentionTensors, Average, require_maps, settings_path
from student.targets.requirement import TargetTaps, taps_of
from student.targets.stored_target import Targets


def distillation(
    student: Float[Tensor, "B L H Q N"], teacher: Float[Tensor, "B L H Q N"], heads: Literal["mean", "sum"] = "mean"
) -> Float[Tensor, ""]:
    """−Σ_j A^t_ij log A^s_ij, mean over batch and queries i, summed over layers; over heads the mean or the sum.

    Heads are averaged by default, as in the authors' code, with which λ = 3 was published; the paper prints the sum.

    Args:
        student: logarithms of rows.
        teacher: rows that sum to one.
        heads: how heads are reduced.
    """
    entropy = -(teacher * student).sum(-1)  # [B, L, H, Q]
    by_head = entropy.mean((0, 3))
    reduced = by_head.mean(1) if heads == "mean" else by_head.sum(1)
    return reduced.sum()


def squares(student: Float[Tensor, "B L *rest"], teacher: Float[Tensor, "B L *rest"]) -> Float[Tensor, ""]:
    """(x^s − x^t)², mean over batch, heads, tokens and width, summed over layers.

    Args:
        student: such as queries `[B, L, H, N, d]`.
        teacher: such as queries, too.
    """
    return (student - teacher).square().flatten(2).mean((0, 2)).sum()


class AttentionTransferConfig(AlignedLossConfig):
    """Settings of attention distillation: of maps, or of the tensors that make them."""

    type: Literal["attention"] = "attention"
    tensors: AttentionTensors = "map"
    average: Average = "none"
    reduce_heads: Literal["mean", "sum"] = "mean"

    @model_validator(mode="after")
    def _of_maps(self) -> AttentionTransferConfig:
        require_maps(self.tensors, average=self.average != "none", reduce_heads=self.reduce_heads != "mean")
        return self


class AttentionTransferLoss(Loss[AttentionTransferConfig]):
    """Attention distillation as a term of the training loss.

    Attributes:
        rows: aligns maps; there with `tensors: map` alone.
        vectors: aligns q, k or v; there with other `tensors` alone.
    """

    Config = AttentionTransferConfig
    rows: AttentionAligner
    vectors: TokenAligner

    def __init__(self, name: str, config: AttentionTransferConfig, student: StudentSpec, targets: Targets) -> None:
        super().__init__(name, config, student, targets)
        if config.tensors == "map":
            self.rows = AttentionAligner(name, config, student, targets, "all", average=config.average)
            self.row = self.rows.row
        else:
            self.vectors = TokenAligner(name, config, student, targets)
            self.vectors.require_widths(f"Compare maps: {setting(f'{settings_path(name)}.tensors', 'map')}")
            self.row = self.vectors.row

    @classmethod
    def student_taps(cls, config: AttentionTransferConfig) -> frozenset[StudentTap]:
        """The student's attention, or its values."""
        return frozenset({"values" if config.tensors == "v" else "attention"})

    @classmethod
    def target_taps(cls, config: AttentionTransferConfig) -> TargetTaps:
        """Whole attention maps or tensors that give them, or vectors."""
        return taps_of(config.tensors)

    def forward(self, inputs: LossInputs) -> Float[Tensor, ""]:
        """The loss of one step."""
        taps, tensors = inputs.student_taps, self.config.tensors
        if tensors == "map":
            student_logs = self.rows.student_logs(taps.attention)
            return distillation(student_logs, self.rows.teacher_rows(inputs.targets), self.config.reduce_heads)
        parts = [
            squares(self.vectors.student_vectors(taps.vectors(tap)), self.vectors.teacher_vectors(target))
            for tap, target in zip(tensors, inputs.targets, strict=True)
        ]
        return torch.stack(parts).sum()
