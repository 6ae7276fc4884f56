"""The projector P that brings a student's tokens into a teacher's width: trained with it, and then dropped.

That of AttnDistill's code, shared by all losses on the class token.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from storage.errors import UserError
from student.alignment.report import AlignmentRow
from student.alignment.student_spec import StudentSpec, full
from student.alignment.student_taps import StudentTaps
from student.settings import WITH_CLASS, ProjectorLossConfig
from student.targets.stored_target import StoredTarget


def projector(width: int, target: int, settings: ProjectorLossConfig) -> nn.Module:
    """P from `[…, D]` to `[…, D_t]`: LayerNorm, `depth` linear maps D → 2D → D → 2D → … → D_t, LayerNorm.

    `mlp` has a GELU between the maps, `linear` none. Depth 0 is the identity.

    Args:
        width: D.
        target: D_t.
        settings: kind and depth.
    """
    if not settings.depth:
        return nn.Identity()
    widths = [width, *(2 * width if n % 2 else width for n in range(1, settings.depth)), target]
    layers: list[nn.Module] = [nn.LayerNorm(width, eps=1e-6)]
    for n, (before, after) in enumerate(pairwise(widths)):
        if n and settings.projector == "mlp":
            layers.append(nn.GELU())
        linear = nn.Linear(before, after)
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
        layers.append(linear)
    return nn.Sequential(*layers, nn.LayerNorm(target, eps=1e-6))


# What they read of the store: the teacher's class token, or the pooled features of one without.
EMBEDDINGS = (("class_token",), ("embedding",))


def words(settings: ProjectorLossConfig) -> str:
    """What P is, for the printed table."""
    return f"projected by {settings.depth} {settings.projector} layer(s)" if settings.depth else "without a projector"


class ClassToken(nn.Module):
    """A student's class token after the final norm, through P, `[B, D_t]`.

    Args:
        loss: name for errors.
        settings: of the projector.
        student: its shape.
        given: the target that it meets, an embedding `[D_t]` or tokens.
        free: whether it may keep a width of its own where there is no projector.

    Attributes:
        at: its place among the student's tokens.
        width: D_t.
        row: of the printed table.

    Raises:
        UserError: the student has no class token, or another width and no projector.
    """

    def __init__(
        self, loss: str, settings: ProjectorLossConfig, student: StudentSpec, given: StoredTarget, *, free: bool = False
    ) -> None:
        super().__init__()
        if "class" not in student.prefix:
            raise UserError(
                f"{loss}: the student has no class token to project; take one that has, such as "
                f"--set student.model={WITH_CLASS}"
            )
        target = int(given.target.sample_shape[-1])
        if not settings.depth and student.width != target and not free:
            raise UserError(
                f"{loss}: the student's tokens are {student.width} wide, those of target {given.id} {target}; they "
                f"meet through a projector: --set losses.{loss}.depth=4"
            )
        self.at = student.prefix.index("class")
        self.width = target if settings.depth else student.width
        self.projector = projector(student.width, target, settings)
        self.row = AlignmentRow(
            loss, given.id, f"{given.target.identity.tap}, {target} wide", f"class token, {student.width} wide",
            words(settings),
        )  # fmt: skip

    def forward(self, seen: StudentTaps) -> Tensor:
        """P of the class token of the student's last forward pass."""
        projected: Tensor = self.projector(full(seen.tokens[:, self.at]))
        return projected
