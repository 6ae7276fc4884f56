"""Token vectors of teacher and student in one shape."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from precompute.taps import full
from storage.errors import UserError, setting
from student.alignment.matching import MERGED, TokenMatching, pick
from student.alignment.student_spec import StudentSpec
from student.settings import AlignmentConfig
from student.targets.stored_target import Targets


class TokenAligner(TokenMatching):
    """Vectors of tokens (q, k, v, or tokens of the residual stream), brought together layer by layer, token by token.

    Both sides come as f32 `[B, L, H, N, d]` for q, k and v and `[B, L, N, D]` for tokens, each in its own width.
    Arguments as for `TokenMatching`: one target, or several taps of one shape.

    Attributes:
        width: of the teacher's vectors.
        student_width: of the student's vectors.
    """

    def __init__(self, loss: str, config: AlignmentConfig, student: StudentSpec, targets: Targets) -> None:
        super().__init__(loss, config, student, targets, "vectors")
        if self.heads and self.rule in MERGED:
            hint = f"Give {setting(f'{self.path}.heads', 'first')}, or null"
            raise UserError(f"{loss}: vectors of different heads cannot be merged", hint=hint)
        self.width = int(targets[0].target.sample_shape[-1])
        self.student_width = student.width // student.heads if self.heads else student.width
        self.widths = [(self.student_width, self.width)] * len(self.pairs)
        self.vector = f"each head's {self.tap}" if self.heads else "each token"

    def student_vectors(self, layers: Sequence[Float[Tensor, "B ... _N d"]]) -> Float[Tensor, "B L ... _N d"]:
        """The student's vectors, with gradients, from those of all of its layers."""
        chosen = torch.stack([full(pick(layers[n - 1], heads)) for n, heads in self.student_heads()], 1)
        return self.kept(chosen, "student", -2)

    def teacher_vectors(self, target: Float[Tensor, "B _L ... _N d"]) -> Float[Tensor, "B L ... _N d"]:
        """The teacher's vectors on the student's grid, from one decoded target."""
        vectors = self.kept(full(self.of_teacher(target)), "teacher", -2)
        return self.resized(vectors) if self.resizes else vectors
