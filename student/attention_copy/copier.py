"""Attention Copy: chosen layers of a student attend with the teacher's stored attention in place of their own.

Li et al., "On the Surprising Effectiveness of Attention Transfer for Vision Transformers", sections 2.2 and 4.1. It is
no loss but a change of the student's forward pass: hooks put in what is copied, where the network has its own.

    map   A_t V_s                       q   softmax(Q_t K_sᵀ/√d) V_s
    qk    softmax(Q_t K_tᵀ/√d) V_s      k   softmax(Q_s K_tᵀ/√d) V_s      v   A_s V_t

What is replaced gets no gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from storage.errors import UserError, setting
from student.alignment.attention import AttentionAligner
from student.alignment.tokens import TokenAligner
from student.models.attention_copy_hooks import AttentionCopyHooks, Copied
from student.settings import WITH_CLASS, WITHOUT, AttentionCopyConfig
from student.targets.requirement import TargetRequirement, taps_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from student.alignment.student_spec import StudentSpec
    from student.alignment.student_taps import StudentTap
    from student.targets.stored_target import StoredTarget


class AttentionCopier(nn.Module):
    """Turns the teacher's stored targets into the attention that a student's layers copy.

    Its interface is that of `student.losses.base.Loss`, without `forward`.

    Args:
        name: for errors.
        config: what is copied where.
        student: the student's shape.
        targets: the stored targets.

    Attributes:
        meets: aligns the targets with the student; checkpoints know it by this name.
        hooks: put the copied attention into a student.
        row: of the alignment table.

    Raises:
        UserError: what differs and was not stated, tokens of the student that the teacher lacks, other widths.
    """

    def __init__(
        self, name: str, config: AttentionCopyConfig, student: StudentSpec, targets: Sequence[StoredTarget]
    ) -> None:
        super().__init__()
        self.config = config
        self.meets: AttentionAligner | TokenAligner
        if config.tensors == "map":
            self.meets = AttentionAligner(name, config, student, targets, "all", average=config.average)
        else:
            self.meets = TokenAligner(name, config, student, targets)
            self.meets.require_widths(f"Copy maps, which have none: {setting(f'{name}.tensors', 'map')}")
        if self.meets.get_buffer("student_tokens").tolist() != list(range(len(student.prefix) + student.grid**2)):
            has_class = "class" in targets[0].teacher.prefix
            also, proposed = (
                ("whose only one is the class token", WITH_CLASS) if has_class else ("of patches alone", WITHOUT)
            )
            lacks = ", ".join(word for word in self.meets.dropped if word.startswith("student"))
            raise UserError(
                f"{name}: every token of a copied layer needs the teacher's attention, and the teacher lacks the "
                f"{lacks}",
                hint=f"Take a student {also}: {setting('student.model', proposed)}",
            )
        layers = [student_layer for student_layer, _ in self.meets.pairs]
        for n in layers:
            if layers.count(n) > 1:
                raise UserError(f"{name}.layers: the student's layer {n} can copy one layer, not {layers.count(n)}")
        self.hooks = AttentionCopyHooks(config.tensors, layers, self.meets.heads)
        self.row = self.meets.row
        # softmax(q·kᵀ·scale) is the teacher's attention; the student's layers scale by 1/√d
        scales = targets[0].target.scales
        self.factors: list[float] = []
        if isinstance(self.meets, TokenAligner) and config.tensors == "qk" and scales:
            stored = [self.meets.stored.index(teacher_layer) for _, teacher_layer in self.meets.pairs]
            self.factors = [scales[n] * self.meets.student_width**0.5 for n in stored]

    @classmethod
    def student_taps(cls, config: AttentionCopyConfig) -> frozenset[StudentTap]:
        """The student's attention, or its values, which must be readable to be replaced."""
        return frozenset({"values" if config.tensors == "v" else "attention"})

    @classmethod
    def requirement(cls, name: str, config: AttentionCopyConfig) -> TargetRequirement:
        """Whole attention maps or tensors that give them, or vectors."""
        return TargetRequirement(loss=name, taps=taps_of(config.tensors), teacher=config.teacher, target=config.target)

    def copied(self, targets: Sequence[Tensor]) -> Copied:
        """What is copied, from decoded targets `[B, L, H, …]`."""
        if isinstance(self.meets, AttentionAligner):
            return {"map": self.meets.teacher_rows(targets)}
        vectors = {
            tap: self.meets.teacher_vectors(target) for tap, target in zip(self.config.tensors, targets, strict=True)
        }
        if self.factors:
            vectors["q"] = vectors["q"] * vectors["q"].new_tensor(self.factors).view(-1, 1, 1, 1)
        return vectors
