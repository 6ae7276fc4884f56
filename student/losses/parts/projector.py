"""The projector P from a student's embedding to a teacher's width: trained with the student, and then dropped.

It is that of AttnDistill's code, shared by all losses on embeddings.
"""

from __future__ import annotations

from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn

from precompute.taps import full
from storage.errors import UserError, setting
from student.alignment.report import AlignmentRow
from student.alignment.student_spec import StudentSpec
from student.alignment.student_taps import StudentTaps
from student.settings import ProjectorLossConfig
from student.targets.stored_target import StoredTarget


def projector(width: int, target: int, config: ProjectorLossConfig) -> nn.Module:
    """P from `[…, D]` to `[…, D_t]`: LayerNorm, `depth` linear maps D → 2D → D → 2D → … → D_t, LayerNorm.

    `mlp` has a GELU between the maps, `linear` none. Depth 0 is the identity.

    Args:
        width: D.
        target: D_t.
        config: kind and depth.
    """
    if not config.depth:
        return nn.Identity()
    widths = [width, *(2 * width if n % 2 else width for n in range(1, config.depth)), target]
    layers: list[nn.Module] = [nn.LayerNorm(width, eps=1e-6)]
    for n, (before, after) in enumerate(pairwise(widths)):
        if n and config.projector == "mlp":
            layers.append(nn.GELU())
        linear = nn.Linear(before, after)
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
        layers.append(linear)
    return nn.Sequential(*layers, nn.LayerNorm(target, eps=1e-6))


# Taps that losses on embeddings read: the teacher's class token, or the pooled features of one without.
EMBEDDINGS = (("class_token",), ("embedding",))


def words(config: ProjectorLossConfig) -> str:
    """P in words, for the alignment table."""
    return f"projected by {config.depth} {config.projector} layer(s)" if config.depth else "without a projector"


class ProjectedEmbedding(nn.Module):
    """A student's embedding, the class token after its final norm or its pooled features, through P.

    Args:
        loss: name of the loss, for errors.
        config: settings of the projector.
        student: the student's shape.
        stored: the target that it is compared with, an embedding `[D_t]` or tokens.
        own_width: without a projector, whether it may be of another width than the target.

    Attributes:
        width: D_t.
        row: of the alignment table.

    Raises:
        UserError: the student has another width, and no projector.
    """

    def __init__(
        self,
        loss: str,
        config: ProjectorLossConfig,
        student: StudentSpec,
        stored: StoredTarget,
        *,
        own_width: bool = False,
    ) -> None:
        super().__init__()
        target, width = int(stored.target.sample_shape[-1]), student.pooled or student.width
        if not config.depth and width != target and not own_width:
            raise UserError(
                f"{loss}: the student's embedding is {width} wide, target {stored.id} {target}",
                hint=f"Put a projector between them: {setting(f'losses.{loss}.depth', 4)}",
            )
        self.width = target if config.depth else width
        self.projector = projector(width, target, config)
        self.row = AlignmentRow(
            loss,
            stored.id,
            f"{stored.target.identity.tap}, {target} wide",
            f"{'pooled features' if student.pooled else 'class token'}, {width} wide",
            words(config),
        )

    def forward(self, taps: StudentTaps) -> Float[Tensor, "B D_t"]:
        """P of the embedding of the student's last forward pass."""
        projected: Tensor = self.projector(full(taps.embedding))
        return projected
