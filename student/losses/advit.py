"""ADViT: the class row of every layer, matched with the teacher's by its distance.

"ADViT" (see docs/papers.md), equations 4 to 6. Heads are averaged on both sides unless it is said otherwise, since the
paper's teacher and students have different numbers of them and it does not say how they meet.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from student.alignment.attention import AttentionAligner, scaled
from student.alignment.student_spec import StudentSpec
from student.losses.base import Loss, LossInputs
from student.settings import AlignedLossConfig, Heads
from student.targets.stored_target import Targets


def distance(
    student: Float[Tensor, "B L H N"], teacher: Float[Tensor, "B L H N"], prefix: int, norm: Literal["l1", "l2"] = "l1"
) -> Float[Tensor, ""]:
    """Σ_i |A^s_i − A^t_i| (Eq. 5) or Σ_i (A^s_i − A^t_i)² (Eq. 6) over the patch keys i.

    Mean over batch, layers and heads.

    Args:
        student: class rows.
        teacher: class rows.
        prefix: how many of the N tokens are no patches.
        norm: L1 or L2.
    """
    difference = (student - teacher)[..., prefix:]
    each = difference.abs() if norm == "l1" else difference.square()
    return each.sum(-1).mean()


def divergence(
    student: Float[Tensor, "B L H N"],
    teacher: Float[Tensor, "B L H N"],
    prefix: int,
    temperature: float = 1.0,
    direction: Literal["teacher-first", "student-first"] = "teacher-first",
) -> Float[Tensor, ""]:
    """τ² · KL(ψ(A^t/τ) ‖ ψ(A^s/τ)) over the patch keys, ψ the softmax: the second term of Eq. 4.

    Mean over batch, layers and heads. As printed, ψ acts on A, which is a softmax already. With the logarithms of both
    sides' rows in place of rows, ψ gives A itself over the patch keys at τ = 1; scores would give the same, since they
    differ from logarithms by a constant a row.

    Args:
        student: class rows, or their logarithms.
        teacher: rows or logarithms, like the student's.
        prefix: how many of the N tokens are no patches.
        temperature: τ.
        direction: which comes first in the KL; the paper prints the student.
    """
    student_logs, teacher_logs = (_softened(values[..., prefix:], temperature) for values in (student, teacher))
    teacher_first = direction == "teacher-first"
    first, second = (teacher_logs, student_logs) if teacher_first else (student_logs, teacher_logs)
    return temperature**2 * (first.exp() * (first - second)).sum(-1).mean().to(student.dtype)


def cross_entropy(
    student: Float[Tensor, "B L H N"], teacher: Float[Tensor, "B L H N"], prefix: int
) -> Float[Tensor, ""]:
    """−Σ_i A^t_i log ψ(A^s)_i over the patch keys: the first term of Eq. 4 with y read as the teacher's map.

    Mean over batch, layers and heads; arguments as for `divergence`, except that the teacher's are always rows.
    """
    return -(teacher[..., prefix:] * _softened(student[..., prefix:], 1.0)).sum(-1).mean().to(student.dtype)


def _softened(patches: Tensor, temperature: float) -> Tensor:
    """log ψ(A/τ) in f64: f32 does not resolve the KL of a softmax of a softmax."""
    return (patches.double() / temperature).log_softmax(-1)


class ADViTConfig(AlignedLossConfig):
    """Settings of ADViT.

    `kl_input`: what the softmax of Eq. 4 acts on, for distances kl and ce; `kl_direction` and `temperature` belong to
    kl alone.
    """

    type: Literal["advit"] = "advit"
    distance: Literal["l1", "l2", "kl", "ce"] = "l1"
    heads: Heads = "mean"
    renorm: bool = Field(False, description="patch keys of each row are scaled to sum to one")
    kl_input: Literal["prob", "log-prob"] = "prob"
    kl_direction: Literal["teacher-first", "student-first"] = "teacher-first"
    temperature: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _belongs(self) -> ADViTConfig:
        if self.distance != "kl" and (self.temperature != 1 or self.kl_direction != "teacher-first"):
            raise ValueError("temperature and kl_direction belong to distance: kl")
        if self.distance not in ("kl", "ce") and self.kl_input != "prob":
            raise ValueError("kl_input belongs to distance: kl or ce")
        return self


class ADViTLoss(Loss[ADViTConfig]):
    """ADViT as a term of the training loss."""

    Config = ADViTConfig
    STUDENT_TAPS = frozenset({"attention"})
    TARGET_TAPS = (("class_row",), ("attention",), ("q", "k"))

    def __init__(self, name: str, config: ADViTConfig, student: StudentSpec, targets: Targets) -> None:
        super().__init__(name, config, student, targets)
        self.rows = AttentionAligner(name, config, student, targets, "class")
        self.row = self.rows.row

    def forward(self, inputs: LossInputs) -> Float[Tensor, ""]:
        """The loss of one step."""
        config, prefix, taps = self.config, self.rows.prefix, inputs.student_taps
        student_logs = config.kl_input == "log-prob"
        teacher_logs = student_logs and config.distance == "kl"  # in the cross-entropy the teacher is not under ψ
        student = (self.rows.student_logs if student_logs else self.rows.student_rows)(taps.attention)
        teacher = (self.rows.teacher_logs if teacher_logs else self.rows.teacher_rows)(inputs.targets)
        if config.renorm:
            # Logarithms stay: a factor on a row adds a constant to them, which ψ does not see.
            student = student[..., prefix:] if student_logs else scaled(student[..., prefix:])
            teacher = teacher[..., prefix:] if teacher_logs else scaled(teacher[..., prefix:])
            prefix = 0
        if config.distance == "kl":
            return divergence(student, teacher, prefix, config.temperature, config.kl_direction)
        if config.distance == "ce":
            return cross_entropy(student, teacher, prefix)
        return distance(student, teacher, prefix, config.distance)
