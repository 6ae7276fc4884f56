"""Feature distillation: the residual stream of chosen layers by its mean squared error.

Attention Transfer's Table 13 (see docs/papers.md): "an auxiliary MSE loss on the residual stream output". Which layers
is not said; the last one by default. A student without tokens, such as a CNN, learns by the maps of its stages: from a
ViT's patch tokens, or from a CNN's maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from storage.errors import UserError, call, setting
from student.alignment.maps import MapAligner
from student.alignment.student_spec import StudentSpec
from student.alignment.tokens import TokenAligner
from student.losses.base import Loss, LossInputs
from student.settings import AlignedLossConfig, Layers, settings_path
from student.targets.requirement import TargetRequirement
from student.targets.stored_target import Targets


class FeatureMSEConfig(AlignedLossConfig):
    """Settings of feature distillation.

    projection: `linear` trains a map that brings widths together; on maps it is a 1x1 convolution.
    """

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
    reads_maps = True

    def __init__(self, name: str, config: FeatureMSEConfig, student: StudentSpec, targets: Targets) -> None:
        super().__init__(name, config, student, targets)
        if not student.stages and not targets[0].target.identity.layers:
            raise UserError(
                f"{name}: target {targets[0].id} holds tokens after the final norm, and this loss compares residual "
                "streams",
                hint=f"Add them: {call('precompute', '…', target='tokens,layers=last')}",
            )
        aligner = MapAligner if student.stages else TokenAligner
        self.aligner: MapAligner | TokenAligner = aligner(name, config, student, targets)
        self.row = self.aligner.row
        self.projections: nn.ModuleList | None = None
        if config.projection:
            self.projections = nn.ModuleList(nn.Linear(*widths) for widths in self.aligner.widths)
        else:
            projection = setting(f"{settings_path(name)}.projection", "linear")
            self.aligner.require_widths(f"Put a trained map between them: {projection}")

    @classmethod
    def requirement(cls, name: str, config: FeatureMSEConfig, student: StudentSpec) -> TargetRequirement:
        """Tokens; a student of maps also learns from maps."""
        taps = (*cls.TARGET_TAPS, ("activations",)) if student.stages else cls.TARGET_TAPS
        return TargetRequirement(loss=name, taps=taps, teacher=config.teacher, target=config.target)

    def forward(self, inputs: LossInputs) -> Float[Tensor, ""]:
        """The loss of one step: mean over batch, tokens and width, summed over pairs of layers or stages."""
        taps, (target,) = inputs.student_taps, inputs.targets
        student: Sequence[Tensor]
        teacher: Sequence[Tensor]
        if isinstance(self.aligner, MapAligner):
            student, teacher = self.aligner.student_vectors(taps.maps), self.aligner.teacher_vectors(target)
        else:
            student = self.aligner.student_vectors(taps.streams).unbind(1)
            teacher = self.aligner.teacher_vectors(target).unbind(1)
        if self.projections is not None:
            student = [project(vectors) for project, vectors in zip(self.projections, student, strict=True)]
        return torch.stack([F.mse_loss(*pair) for pair in zip(student, teacher, strict=True)]).sum()
