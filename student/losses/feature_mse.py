"""Feature distillation: the residual stream of chosen layers by its mean squared error.

Attention Transfer's Table 13 (see docs/papers.md): "an auxiliary MSE loss on the residual stream output". Which layers
is not said; the last one by default.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from storage.errors import UserError, call, setting
from student.alignment.student_spec import StudentSpec
from student.alignment.tokens import TokenAligner
from student.losses.attention_transfer import squares
from student.losses.base import Loss, LossInputs
from student.settings import AlignedLossConfig, Layers, settings_path
from student.targets.stored_target import Targets


class FeatureMSEConfig(AlignedLossConfig):
    """Settings of feature distillation; with `projection` a linear map is trained that brings widths together."""

    type: Literal["features"] = "features"
    layers: Layers | None = "last"
    heads: None = None
    head_temperature: None = None
    projection: Literal["linear"] | None = None


class FeatureMSELoss(Loss[FeatureMSEConfig]):
    """Feature distillation as a term of the training loss; a projection is trained with the student."""

    Config = FeatureMSEConfig
    STUDENT_TAPS = frozenset({"streams"})
    TARGET_TAPS = (("tokens",),)

    def __init__(self, name: str, config: FeatureMSEConfig, student: StudentSpec, targets: Targets) -> None:
        super().__init__(name, config, student, targets)
        if not targets[0].target.identity.layers:
            raise UserError(
                f"{name}: target {targets[0].id} holds tokens after the final norm, and this loss compares residual "
                "streams",
                hint=f"Add them: {call('precompute', '…', target='tokens,layers=last')}",
            )
        self.vectors = TokenAligner(name, config, student, targets)
        self.row = self.vectors.row
        self.projections: nn.ModuleList | None = None
        if config.projection:
            widths = self.vectors.student_width, self.vectors.width
            self.projections = nn.ModuleList(nn.Linear(*widths) for _ in self.vectors.pairs)
        else:
            projection = setting(f"{settings_path(name)}.projection", "linear")
            self.vectors.require_width(f"Put a trained map between them: {projection}")

    def forward(self, inputs: LossInputs) -> Float[Tensor, ""]:
        """The loss of one step."""
        student = self.vectors.student_vectors(inputs.student_taps.streams)
        teacher = self.vectors.teacher_vectors(inputs.targets[0])
        if self.projections is not None:
            student = torch.stack([project(student[:, n]) for n, project in enumerate(self.projections)], 1)
        return squares(student, teacher)
