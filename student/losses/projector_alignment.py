"""Projector alignment of AttnDistill: the student's projected class token, near the teacher's.

Wang, Yang and van de Weijer, "Attention Distillation: self-supervised vision transformer students need more guidance",
Eq. 5. SimReg (Navaneet et al., "SimReg: Regression as a Simple Yet Effective Tool for Self-supervised Knowledge
Distillation") is the distance `cosine`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from precompute.taps import full
from storage.errors import UserError, call, setting
from student.alignment.student_spec import StudentSpec
from student.alignment.student_taps import StudentTap
from student.alignment.tokens import TokenAligner
from student.losses.base import Loss, LossInputs
from student.losses.parts.projector import EMBEDDINGS, ProjectedEmbedding, words
from student.settings import AlignedLossConfig, ProjectorLossConfig
from student.targets.requirement import TargetTaps
from student.targets.stored_target import StoredTarget, Targets

Distance = Literal["mse", "l2", "sq", "cosine"]

_TAPS: dict[str, frozenset[StudentTap]] = {
    "class": frozenset({"embedding"}),
    "patches": frozenset({"tokens"}),
    "both": frozenset({"embedding", "tokens"}),
}


def mean_distance(
    student: Float[Tensor, "*axes D_t"], teacher: Float[Tensor, "*axes D_t"], distance: Distance = "mse"
) -> Float[Tensor, ""]:
    """Distance between the vectors of student and teacher, mean over all of them.

    `mse`: mean squared difference over the width (default, the authors' code); `l2`: ‖E_t − P(E_s)‖₂, as Eq. 5 prints;
    `sq`: its square; `cosine`: the square for vectors of norm one, 2 − 2 cos (SimReg).

    Args:
        student: P(E_s).
        teacher: E_t.
        distance: reading of Eq. 5.
    """
    if distance == "mse":
        return F.mse_loss(student, teacher)
    if distance == "cosine":
        return (2 - 2 * F.cosine_similarity(student, teacher, dim=-1)).mean()
    difference = student - teacher
    each = difference.norm(dim=-1) if distance == "l2" else difference.square().sum(-1)
    return each.mean()


class ProjectorAlignmentConfig(ProjectorLossConfig):
    """Settings of projector alignment.

    tokens: the `class` token (of a student without one its pooled features), the `patches` (which need a `tokens`
        target), or `both`.
    grid: `bicubic` resizes the teacher's patches; None: the same grid on both sides.
    """

    type: Literal["alignment"] = "alignment"
    distance: Distance = "mse"
    tokens: Literal["class", "patches", "both"] = "class"
    grid: Literal["bicubic"] | None = None


class ProjectorAlignmentLoss(Loss[ProjectorAlignmentConfig]):
    """Projector alignment as a term of the training loss.

    Attributes:
        token: the student's embedding, projected; checkpoints know it by this name.
        patches: aligns patch tokens; there with `tokens: patches` or `both` alone.
    """

    Config = ProjectorAlignmentConfig
    patches: TokenAligner

    def __init__(self, name: str, config: ProjectorAlignmentConfig, student: StudentSpec, targets: Targets) -> None:
        super().__init__(name, config, student, targets)
        (stored,) = targets
        self.token = ProjectedEmbedding(name, config, student, stored)
        self.row = self.token.row
        if config.tokens != "class":
            self.patches = _align_patches(name, config, student, stored)
            self.row = replace(self.patches.row, rule=f"{self.patches.row.rule}; {words(config)}")
            self.teacher_class = stored.teacher.prefix.index("class") if config.tokens == "both" else 0

    @classmethod
    def student_taps(cls, config: ProjectorAlignmentConfig) -> frozenset[StudentTap]:
        """Its embedding; with patches all tokens after the norm."""
        return _TAPS[config.tokens]

    @classmethod
    def target_taps(cls, config: ProjectorAlignmentConfig) -> TargetTaps:
        """The teacher's class token, or the pooled features of one without; with patches all tokens after the norm."""
        return EMBEDDINGS if config.tokens == "class" else (("tokens",),)

    def forward(self, inputs: LossInputs) -> Float[Tensor, ""]:
        """The loss of one step."""
        config, taps, (target,) = self.config, inputs.student_taps, inputs.targets
        if config.tokens == "class":
            return mean_distance(self.token(taps), full(target), config.distance)
        first = self.patches.prefix
        student = self.patches.student_vectors([taps.tokens] * self.patches.student.layers)[..., first:, :]
        teacher = self.patches.teacher_vectors(target)[..., first:, :]
        loss = mean_distance(self.token.projector(student), teacher, config.distance)
        if config.tokens == "patches":
            return loss
        return loss + mean_distance(self.token(taps), full(target[:, 0, self.teacher_class]), config.distance)


def _align_patches(
    name: str, config: ProjectorAlignmentConfig, student: StudentSpec, stored: StoredTarget
) -> TokenAligner:
    """Aligns the patch tokens of both sides.

    Raises:
        UserError: the target holds tokens before the final norm, or the teacher lacks a class token that is asked for.
    """
    if stored.target.identity.layers is not None:
        hint = f"Keep the tokens after it: {call('precompute', '…', target='tokens')}"
        raise UserError(f"{name}: target {stored.id} holds the residual stream, before the final norm", hint=hint)
    if config.tokens == "both" and "class" not in stored.teacher.prefix:
        hint = f"Align patches alone: {setting(f'losses.{name}.tokens', 'patches')}"
        raise UserError(f"{name}: the teacher has no class token", hint=hint)
    return TokenAligner(name, AlignedLossConfig(layers="last", grid=config.grid), student, [stored])
