"""Projector alignment of AttnDistill: the student's projected class token, near the teacher's.

Wang, Yang and van de Weijer, "Attention Distillation: self-supervised vision transformer students need more guidance",
Eq. 5. SimReg (Navaneet et al., "SimReg: Regression as a Simple Yet Effective Tool for Self-supervised Knowledge
Distillation") is the reading `cosine`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from storage.errors import UserError
from student.alignment.student_spec import StudentSpec, full
from student.alignment.student_taps import StudentTap
from student.alignment.tokens import TokenAligner
from student.losses.base import LossInputs
from student.losses.parts.projector import EMBEDDINGS, ClassToken, words
from student.settings import AlignedLossConfig, ProjectorLossConfig
from student.targets.requirement import TargetRequirement
from student.targets.stored_target import StoredTarget

Reading = Literal["mse", "l2", "sq", "cosine"]


def distance(student: Tensor, teacher: Tensor, reading: Reading = "mse") -> Tensor:
    """How far vectors are apart, mean over all of them.

    `mse`: mean squared difference over the width (default, the authors' code); `l2`: ‖E_t − P(E_s)‖₂, as Eq. 5 prints;
    `sq`: its square; `cosine`: the same of vectors of norm one, 2 − 2 cos (SimReg).

    Args:
        student: `[…, D_t]`.
        teacher: likewise.
        reading: of Eq. 5.
    """
    if reading == "mse":
        return F.mse_loss(student, teacher)
    if reading == "cosine":
        return (2 - 2 * F.cosine_similarity(student, teacher, dim=-1)).mean()
    difference = student - teacher
    each = difference.norm(dim=-1) if reading == "l2" else difference.square().sum(-1)
    return each.mean()


class Settings(ProjectorLossConfig):
    """The projected class token by its distance.

    tokens: the `class` token, the `patches` (which need a `tokens` target), or `both`.
    grid: `bicubic` resizes the teacher's patches; None: the same grid on both sides.
    """

    type: Literal["alignment"] = "alignment"
    distance: Literal["mse", "l2", "sq", "cosine"] = "mse"
    tokens: Literal["class", "patches", "both"] = "class"
    grid: Literal["bicubic"] | None = None


def reads(settings: Settings) -> frozenset[StudentTap]:
    """The student's final tokens."""
    return frozenset({"tokens"})


def need(name: str, settings: Settings, student: StudentSpec) -> TargetRequirement:
    """The teacher's class token, or the pooled features of one without; with patches all tokens after the norm."""
    taps = EMBEDDINGS if settings.tokens == "class" else (("tokens",),)
    return TargetRequirement(name, taps, settings.teacher, settings.target)


class Method(nn.Module):
    """Projector alignment as a term of the training loss."""

    def __init__(self, name: str, settings: Settings, student: StudentSpec, given: Sequence[StoredTarget]) -> None:
        super().__init__()
        self.reading, self.tokens = settings.distance, settings.tokens
        self.token = ClassToken(name, settings, student, given[0])
        self.row = self.token.row
        self.patches: TokenAligner | None = None
        if self.tokens != "class":
            self.patches = _patches(name, settings, student, given[0])
            self.row = replace(self.patches.row, rule=f"{self.patches.row.rule}; {words(settings)}")
            self.theirs = given[0].teacher.prefix.index("class") if self.tokens == "both" else 0

    def forward(self, step: LossInputs) -> Tensor:
        """The loss of one step."""
        seen, (target,) = step.student, step.targets
        if self.patches is None:
            return distance(self.token(seen), full(target), self.reading)
        first = self.patches.prefix
        mine = self.patches.student_vectors([seen.tokens] * self.patches.student.layers)[..., first:, :]
        theirs = self.patches.teacher_vectors(target)[..., first:, :]
        loss = distance(self.token.projector(mine), theirs, self.reading)
        if self.tokens == "patches":
            return loss
        return loss + distance(self.token(seen), full(target[:, 0, self.theirs]), self.reading)


def _patches(name: str, settings: Settings, student: StudentSpec, given: StoredTarget) -> TokenAligner:
    """How the patch tokens of both sides meet.

    Raises:
        UserError: the target holds tokens before the final norm, or the teacher has no class token that is asked for.
    """
    if given.target.identity.layers is not None:
        raise UserError(
            f"{name}: target {given.id} holds the residual stream, before the final norm; keep the tokens after it: "
            "pipeline precompute … --target tokens"
        )
    if settings.tokens == "both" and "class" not in given.teacher.prefix:
        raise UserError(
            f"{name}: the teacher has no class token; align patches alone: --set losses.{name}.tokens=patches"
        )
    return TokenAligner(name, AlignedLossConfig(layers="last", grid=settings.grid), student, [given])
