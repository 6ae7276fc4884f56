"""Maps of a student's stages and what they are compared with, on the student's grid."""

from __future__ import annotations

from itertools import accumulate, pairwise

from jaxtyping import Float
from torch import Tensor

from precompute.taps import full
from storage.errors import UserError, setting
from student.alignment.matching import LayerMatching, patch_grid
from student.alignment.report import AlignmentRow
from student.alignment.student_spec import StudentSpec
from student.settings import AlignmentConfig
from student.targets.stored_target import Targets


class MapAligner(LayerMatching):
    """Maps of a student without tokens, and a teacher's patch tokens or maps, pair by pair.

    Both sides come as f32 `[B, P, D]`, a vector for each of the P places of the student's stage, each in its own width.
    Arguments as for `LayerMatching`, with one target of `tokens` or `activations`.

    Attributes:
        row: of the alignment table.

    Raises:
        UserError: also a stage of the student that no module gives.
    """

    def __init__(self, loss: str, config: AlignmentConfig, student: StudentSpec, targets: Targets) -> None:
        super().__init__(loss, config, student, targets)
        (stored,) = targets
        target, self.prefix = stored.target, len(stored.teacher.prefix)
        if self.tap == "tokens":
            self.channels = [int(target.sample_shape[-1])] * len(self.stored)
            side = patch_grid(loss, stored)
        else:
            self.channels = [stage.channels for stage in target.stages]
            side = int(target.sample_shape[-1])
        self.grids = [student.stages[mine - 1].grid for mine, _ in self.pairs]
        self.side, self.widths, names = side, list[tuple[int, int]](), list[str]()
        for (mine, theirs), grid in zip(self.pairs, self.grids, strict=True):
            stage = student.stages[mine - 1]
            if stage.module is None:
                hint = f"Choose another: {setting(f'{self.path}.layers', '[[student,teacher],…]')}"
                raise UserError(f"{loss}: no module of the student gives the map of its stage {mine}", hint=hint)
            self.register_resize(side, grid, stored.id, f"resize_{grid}")
            names.append(f"stage {mine} ({stage.width} maps of {grid}x{grid}) - {theirs}")
            self.widths.append((stage.width, self.channels[self.stored.index(theirs)]))
        resized = f"; the teacher's resized from {side}x{side} (bicubic)" * any(grid != side for grid in self.grids)
        dropped = f"; left out: teacher's {', '.join(stored.teacher.prefix)}" * (
            self.tap == "tokens" and self.prefix > 0
        )
        self.row = AlignmentRow(
            loss,
            stored.id,
            f"{self.tap}, layers {', '.join(map(str, self.stored))}, {side}x{side} patches",
            f"{student.layers} stages",
            f"{', '.join(names)} (student-teacher){resized}{dropped}",
        )

    def student_vectors(self, maps: dict[int, Float[Tensor, "B _P _D"]]) -> list[Float[Tensor, "B _P _D"]]:
        """The student's, with gradients, from `StudentTaps.maps`."""
        return [full(maps[mine]) for mine, _ in self.pairs]

    def teacher_vectors(self, target: Float[Tensor, "B ..."]) -> list[Float[Tensor, "B _P _D"]]:
        """The teacher's on the grid of the student's stages, from a decoded target."""
        if self.tap == "tokens":
            layers = [*full(target)[:, :, self.prefix :].unbind(1)]
        else:
            bounds = pairwise(accumulate(self.channels, initial=0))
            layers = [full(target)[:, start:stop].flatten(2).transpose(1, 2) for start, stop in bounds]
        chosen = (layers[self.stored.index(theirs)] for _, theirs in self.pairs)
        return [
            layer if grid == self.side else self.get_buffer(f"resize_{grid}") @ layer
            for layer, grid in zip(chosen, self.grids, strict=True)
        ]
