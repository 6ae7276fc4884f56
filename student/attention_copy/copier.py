"""Attention Copy: chosen layers of a student attend with the teacher's stored attention in place of their own.

Li et al., "On the Surprising Effectiveness of Attention Transfer for Vision Transformers", sections 2.2 and 4.1. It is
no loss but a change of the student's forward pass: what is copied goes in by hooks, where the network has its own.

    map   A_t V_s                       q   softmax(Q_t K_sᵀ/√d) V_s
    qk    softmax(Q_t K_tᵀ/√d) V_s      k   softmax(Q_s K_tᵀ/√d) V_s      v   A_s V_t

What is replaced gets no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from storage.errors import UserError
from student.alignment.attention import AttentionAligner
from student.alignment.student_spec import StudentSpec
from student.alignment.tokens import TokenAligner
from student.models.attention_copy_hooks import AttentionCopyHooks, Copied
from student.settings import ATTENTION_COPY, WITH_CLASS, WITHOUT, AttentionCopyConfig
from student.targets.requirement import TargetRequirement, taps_of
from student.targets.stored_target import StoredTarget


def requirement(settings: AttentionCopyConfig) -> TargetRequirement:
    """What is copied from."""
    return TargetRequirement(ATTENTION_COPY, taps_of(settings.tensors), settings.teacher, settings.target)


class AttentionCopier(nn.Module):
    """Turns the teacher's stored targets into what a student's layers copy.

    Args:
        settings: what is copied where.
        student: its shape.
        given: the targets.

    Raises:
        UserError: what differs and was not stated, tokens of the student that the teacher lacks, other widths.
    """

    def __init__(self, settings: AttentionCopyConfig, student: StudentSpec, given: Sequence[StoredTarget]) -> None:
        super().__init__()
        name, self.tensors = ATTENTION_COPY, settings.tensors
        self.meets: AttentionAligner | TokenAligner
        if settings.tensors == "map":
            self.meets = AttentionAligner(name, settings, student, given, "all", settings.average)
        else:
            self.meets = TokenAligner(name, settings, student, given)
            self.meets.require_width(f"copy maps, which have none: --set {name}.tensors=map")
        if self.meets.get_buffer("mine").tolist() != list(range(len(student.prefix) + student.grid**2)):
            has_class = "class" in given[0].teacher.prefix
            also, proposed = (
                ("whose only one is the class token", WITH_CLASS) if has_class else ("of patches alone", WITHOUT)
            )
            lacks = ", ".join(word for word in self.meets.dropped if word.startswith("student"))
            raise UserError(
                f"{name}: every token of a copied layer needs the teacher's attention, and the teacher lacks the "
                f"{lacks}; take a student {also}: --set student.model={proposed}"
            )
        layers = [own for own, _ in self.meets.pairs]
        for n in layers:
            if layers.count(n) > 1:
                raise UserError(f"{name}.layers: the student's layer {n} can copy one layer, not {layers.count(n)}")
        self.copies = AttentionCopyHooks(settings.tensors, layers, self.meets.heads)
        self.row = self.meets.row
        # softmax(q·kᵀ·scale) is the teacher's attention; the student's layers scale by 1/√d
        scales = given[0].target.scales
        self.factors: list[float] = []
        if isinstance(self.meets, TokenAligner) and settings.tensors == "qk" and scales:
            at = [self.meets.stored.index(other) for _, other in self.meets.pairs]
            self.factors = [scales[i] * self.meets.own**0.5 for i in at]

    def copied(self, targets: Sequence[Tensor]) -> Copied:
        """What is copied, from decoded targets `[B, L, H, …]`."""
        if isinstance(self.meets, AttentionAligner):
            return {"map": self.meets.teacher_rows(targets)}
        found = {part: self.meets.teacher_vectors(target) for part, target in zip(self.tensors, targets, strict=True)}
        if self.factors:
            found["q"] = found["q"] * found["q"].new_tensor(self.factors).view(-1, 1, 1, 1)
        return found
