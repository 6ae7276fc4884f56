"""Feature distillation: the residual stream of chosen layers by its mean squared error.

Attention Transfer's Table 13 (see docs/papers.md): "an auxiliary MSE loss on the residual stream output". Which layers
is not said; the last one by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from storage.errors import UserError
from student.alignment.student_spec import StudentSpec
from student.alignment.student_taps import StudentTap
from student.alignment.tokens import TokenAligner
from student.losses.attention_transfer import squares
from student.losses.base import LossInputs
from student.settings import AlignedLossConfig, Layers, setting
from student.targets.requirement import TargetRequirement
from student.targets.stored_target import StoredTarget


class Settings(AlignedLossConfig):
    """Residual streams by their mean squared error."""

    type: Literal["features"] = "features"
    layers: Layers | None = "last"
    heads: None = None
    head_temperature: None = None
    projection: Literal["linear"] | None = None


def reads(settings: Settings) -> frozenset[StudentTap]:
    """The student's residual streams."""
    return frozenset({"streams"})


def need(name: str, settings: Settings, student: StudentSpec) -> TargetRequirement:
    """Tokens of layers."""
    return TargetRequirement(name, (("tokens",),), settings.teacher, settings.target)


class Method(nn.Module):
    """Feature distillation as a term of the training loss; a projection is trained with the student."""

    def __init__(self, name: str, settings: Settings, student: StudentSpec, given: Sequence[StoredTarget]) -> None:
        super().__init__()
        if not given[0].target.identity.layers:
            raise UserError(
                f"{name}: target {given[0].id} holds tokens after the final norm, and this loss compares residual "
                "streams; add them: pipeline precompute … --target tokens,layers=last"
            )
        self.vectors = TokenAligner(name, settings, student, given)
        self.row = self.vectors.row
        count = len(self.vectors.pairs)
        self.projections: nn.ModuleList | None = None
        if settings.projection:
            self.projections = nn.ModuleList(nn.Linear(self.vectors.own, self.vectors.width) for _ in range(count))
        else:
            self.vectors.require_width(f"a trained map between them: --set {setting(name)}.projection=linear")

    def forward(self, step: LossInputs) -> Tensor:
        """The loss of one step."""
        mine, theirs = self.vectors.student_vectors(step.student.streams), self.vectors.teacher_vectors(step.targets[0])
        if self.projections is not None:
            mine = torch.stack([project(mine[:, n]) for n, project in enumerate(self.projections)], 1)
        return squares(mine, theirs)
