"""ADViT: the class row of every layer, matched with the teacher's by its distance.

"ADViT" (see docs/papers.md), equations 4 to 6. Heads are averaged on both sides unless it is said otherwise, since the
paper's teacher and students have different numbers of them and it does not say how they meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from student.alignment.attention import AttentionAligner, scaled
from student.alignment.student_spec import StudentSpec
from student.alignment.student_taps import StudentTap
from student.losses.base import LossInputs
from student.settings import AlignedLossConfig, Heads
from student.targets.requirement import TargetRequirement
from student.targets.stored_target import StoredTarget


def distance(student: Tensor, teacher: Tensor, prefix: int, kind: Literal["l1", "l2"] = "l1") -> Tensor:
    """Σ_i |A^s_i − A^t_i| (Eq. 5) or Σ_i (A^s_i − A^t_i)² (Eq. 6) over the patch keys i.

    Mean over batch, layers and heads.

    Args:
        student: class rows `[B, L, H, N]`.
        teacher: likewise.
        prefix: how many of the N tokens are no patches.
        kind: of distance.
    """
    difference = (student - teacher)[..., prefix:]
    each = difference.abs() if kind == "l1" else difference.square()
    return each.sum(-1).mean()


def divergence(
    student: Tensor, teacher: Tensor, prefix: int, temperature: float = 1.0,
    direction: Literal["teacher-first", "student-first"] = "teacher-first",
) -> Tensor:  # fmt: skip
    """τ² · KL(ψ(A^t/τ) ‖ ψ(A^s/τ)) over the patch keys, ψ the softmax: the second term of Eq. 4.

    Mean over batch, layers and heads. As printed, ψ acts on A, which is a softmax already. Given the logarithms of
    both sides' rows in place of rows, it gives A itself over the patch keys at τ = 1, and the same as scores do, for
    these differ by a constant a row.

    Args:
        student: class rows `[B, L, H, N]`, or their logarithms.
        teacher: likewise.
        prefix: how many of the N tokens are no patches.
        temperature: τ.
        direction: which comes first in the KL; the paper prints the student.
    """
    ours, theirs = (_softened(values[..., prefix:], temperature) for values in (student, teacher))
    first, second = (theirs, ours) if direction == "teacher-first" else (ours, theirs)
    return temperature**2 * (first.exp() * (first - second)).sum(-1).mean().to(student.dtype)


def cross_entropy(student: Tensor, teacher: Tensor, prefix: int) -> Tensor:
    """−Σ_i A^t_i log ψ(A^s)_i over the patch keys: the first term of Eq. 4 with y read as the teacher's map.

    Mean over batch, layers and heads; arguments as for `divergence`, but that the teacher's are always rows.
    """
    return -(teacher[..., prefix:] * _softened(student[..., prefix:], 1.0)).sum(-1).mean().to(student.dtype)


def _softened(patches: Tensor, temperature: float) -> Tensor:
    """log ψ(A/τ) in f64: of a softmax of a softmax f32 resolves no KL."""
    return (patches.double() / temperature).log_softmax(-1)


class Settings(AlignedLossConfig):
    """Class rows by their distance.

    `kl_input` says what the softmax of Eq. 4 acts on, for distances kl and ce; the other two belong to kl alone.
    """

    type: Literal["advit"] = "advit"
    distance: Literal["l1", "l2", "kl", "ce"] = "l1"
    heads: Heads = "mean"
    renorm: bool = Field(False, description="patch keys of each row are scaled to sum to one")
    kl_input: Literal["prob", "log-prob"] = "prob"
    kl_direction: Literal["teacher-first", "student-first"] = "teacher-first"
    temperature: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _belongs(self) -> Settings:
        if self.distance != "kl" and (self.temperature != 1 or self.kl_direction != "teacher-first"):
            raise ValueError("temperature and kl_direction belong to distance: kl")
        if self.distance not in ("kl", "ce") and self.kl_input != "prob":
            raise ValueError("kl_input belongs to distance: kl or ce")
        return self


def reads(settings: Settings) -> frozenset[StudentTap]:
    """The student's class rows."""
    return frozenset({"attention"})


def need(name: str, settings: Settings, student: StudentSpec) -> TargetRequirement:
    """Class rows, or what gives them."""
    return TargetRequirement(name, (("class_row",), ("attention",), ("q", "k")), settings.teacher, settings.target)


class Method(nn.Module):
    """ADViT as a term of the training loss."""

    def __init__(self, name: str, settings: Settings, student: StudentSpec, given: Sequence[StoredTarget]) -> None:
        super().__init__()
        self.rows = AttentionAligner(name, settings, student, given, "class")
        self.row, self.settings = self.rows.row, settings

    def forward(self, step: LossInputs) -> Tensor:
        """The loss of one step."""
        how, prefix = self.settings, self.rows.prefix
        logs = how.kl_input == "log-prob"  # of the student; of the teacher where it is under ψ, too
        both = logs and how.distance == "kl"
        of_student = self.rows.student_logs if logs else self.rows.student_rows
        mine = of_student(step.student.q, step.student.k, step.student.scales)
        theirs = (self.rows.teacher_logs if both else self.rows.teacher_rows)(step.targets)
        if how.renorm:
            # Logarithms stay: a factor on a row adds a constant to them, which ψ takes no notice of.
            mine = mine[..., prefix:] if logs else scaled(mine[..., prefix:])
            theirs = theirs[..., prefix:] if both else scaled(theirs[..., prefix:])
            prefix = 0
        if how.distance == "kl":
            return divergence(mine, theirs, prefix, how.temperature, how.kl_direction)
        if how.distance == "ce":
            return cross_entropy(mine, theirs, prefix)
        return distance(mine, theirs, prefix, how.distance)
