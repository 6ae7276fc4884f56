"""Which of the teacher's layers, maps and tokens meet which of the student's: decided once, here, for all methods.

Nothing is matched by chance: what is not stated and does not fit is an error that names both sides.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from precompute.taps import attention_layers, check_attention, prefix_roles
from storage.errors import UserError
from storage.records import Record


@dataclass(frozen=True)
class Shape:
    """What a student offers to be taught: layers, heads in each, side of its patch grid, roles of its prefix tokens."""

    layers: int
    heads: int
    grid: int
    prefix: tuple[str, ...]

    @property
    def maps(self) -> int:
        """Class-row maps, one a layer and head."""
        return self.layers * self.heads


def student_shape(model: nn.Module) -> Shape:
    """The shape of a plain ViT.

    Raises:
        UserError: attention cannot be read off it, or what is read is not what it attends with (contract 12).
    """
    layers = attention_layers(model)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is not None:
        was = model.training
        ramp = torch.linspace(-1, 1, 2 * 3 * size[0] * size[1]).sin().view(2, 3, *size)
        check_attention(model.eval(), ramp.to(next(model.parameters()).device))
        model.train(was)
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is None or grid[0] != grid[1]:
        raise UserError(f"student {type(model).__name__}: its patches make no square grid")
    return Shape(len(layers), int(layers[0].num_heads), int(grid[0]), prefix_roles(model))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Row:
    """One line of the printed table."""

    loss: str
    target: str
    teacher: str
    student: str
    rule: str


def align_activations(loss: str, manifest: Record, student: Shape) -> Row:
    """AAL: every class-row map of the student may be linked to every activation map of the teacher.

    Raises:
        UserError: the target's grid is not the student's (maps are never resampled twice), or no class token.
    """
    channels, grid = manifest["sample_shape"][0], manifest["identity"]["grid"]
    if grid != student.grid:
        raise UserError(
            f"{loss}: target {manifest['id']} has a grid of {grid}x{grid}, the student's patches make "
            f"{student.grid}x{student.grid}; stored maps are never resampled: precompute with grid={student.grid}"
        )
    if "class" not in student.prefix:
        raise UserError(f"{loss}: the student has no class token, so no class rows to link")
    stages = " + ".join(str(stage["channels"]) for stage in manifest["stages"])
    dropped = ", ".join(student.prefix)
    return Row(
        loss, manifest["id"], f"{channels} maps ({stages}) of {grid}x{grid}",
        f"{student.layers} layers x {student.heads} heads = {student.maps} class rows of {student.grid}x{student.grid}",
        f"full links, {channels * student.maps + channels:,} weights; keys left out: {dropped}",
    )  # fmt: skip


def table(rows: list[Row]) -> str:
    """The printed table of all that meets."""
    lines = []
    for row in rows:
        lines += [
            f"{row.loss}: {row.target}",
            f"  teacher  {row.teacher}",
            f"  student  {row.student}",
            f"  rule     {row.rule}",
        ]
    return "\n".join(lines)
