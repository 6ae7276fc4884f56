"""The interface of losses, and what a loss gets of a training step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

from jaxtyping import Float, Int64
from torch import Tensor, nn

from student.alignment.report import AlignmentRow
from student.alignment.student_spec import StudentSpec
from student.alignment.student_taps import StudentTap, StudentTaps
from student.settings import LossConfig, TeacherLossConfig
from student.targets.requirement import TargetRequirement, TargetTaps
from student.targets.stored_target import Targets

ConfigT = TypeVar("ConfigT", bound=LossConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """What a loss gets of one training step.

    Attributes:
        logits: of the student's class head; its pooled features for a student without one.
        distillation_logits: of the student's distillation head; None for a student without one.
        student_taps: all else that losses read of the student.
        labels: −1 where the shards have none.
        mix_labels: labels of the images that were mixed in.
        mix_weights: share of the mixed-in image.
        targets: the loss's stored targets, decoded; empty for a loss that reads none.
        metrics: a loss may add scalars to be logged, such as agreement with the teacher.
    """

    logits: Float[Tensor, "B K"]
    distillation_logits: Float[Tensor, "B K"] | None = None
    student_taps: StudentTaps
    labels: Int64[Tensor, " B"]
    mix_labels: Int64[Tensor, " B"]
    mix_weights: Float[Tensor, " B"]
    targets: tuple[Float[Tensor, "B ..."], ...] = ()
    metrics: dict[str, Float[Tensor, ""]] = field(default_factory=dict)


class Loss(nn.Module, Generic[ConfigT]):
    """One loss of a recipe, made for one student and its stored targets.

    Args:
        name: of the loss in the recipe.
        config: its settings.
        student: the student's shape.
        targets: its stored targets, those of one alternative of `requirement`.

    Attributes:
        Config: class of its settings; the default of `type` there is its name in the registry.
        STUDENT_TAPS: what it reads of the student and of the batch, where that does not depend on its settings.
        TARGET_TAPS: what it reads of the teacher, alternatives as in `TargetRequirement.taps`; likewise.
        supports_pooling: whether students that pool their patches, such as PiT, can learn by it.
        reads_maps: whether a student without tokens, such as a CNN, gives maps in place of streams.
        row: its row of the alignment table; None for a loss without stored targets.
        metadata: saved with the parameters that it learned, as JSON; None where they need none.
        source_digest: digest of what it took from another run, which a resumed run must find again; None of others.
    """

    Config: ClassVar[type[LossConfig]]
    STUDENT_TAPS: ClassVar[frozenset[StudentTap]] = frozenset()
    TARGET_TAPS: ClassVar[TargetTaps] = ()
    supports_pooling: ClassVar[bool] = False
    reads_maps: ClassVar[bool] = False
    row: AlignmentRow | None = None
    metadata: dict[str, Any] | None = None
    source_digest: str | None = None

    def __init__(self, name: str, config: ConfigT, student: StudentSpec, targets: Targets) -> None:
        super().__init__()
        self.name, self.config = name, config

    @classmethod
    def student_taps(cls, config: ConfigT) -> frozenset[StudentTap]:
        """What it reads of the student and of the batch, beside stored targets."""
        return cls.STUDENT_TAPS

    @classmethod
    def target_taps(cls, config: ConfigT) -> TargetTaps:
        """What it reads of the teacher, alternatives as in `TargetRequirement.taps`."""
        return cls.TARGET_TAPS

    @classmethod
    def requirement(cls, name: str, config: ConfigT, student: StudentSpec) -> TargetRequirement | None:
        """What it reads from a store; None: nothing."""
        if not isinstance(config, TeacherLossConfig):
            return None
        taps = cls.target_taps(config)
        return TargetRequirement(loss=name, taps=taps, teacher=config.teacher, target=config.target)

    def forward(self, inputs: LossInputs) -> Float[Tensor, ""]:
        """The loss of one step."""
        raise NotImplementedError
