"""Which of the teacher's layers, heads, patches and tokens meet which of the student's: decided once, for all methods.

Nothing is matched by chance: what is not stated and does not fit is an error that names both sides. The rules are those
of docs/papers.md ("What meets what"). Attention rows meet in `student.rows`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from precompute.taps import attention_layers, check_attention, layer_grids, prefix_roles, token_blocks
from storage.errors import IdentityError, UserError
from storage.names import all_normalized
from storage.records import Record

# Students that errors propose: with a class token alone, and with none beside the patches.
WITH_CLASS, WITHOUT = "vit_tiny_patch16_224", "vit_base_patch16_gap_224"


@dataclass(frozen=True)
class Shape:
    """What a student offers to be taught.

    PiT pools its patches: what layers have differs, `each` says it, and `heads` and `grid` are what most layers have.

    Attributes:
        layers: number of layers; 0 where no loss reads tokens.
        heads: in each layer; 0 where attention cannot be read, and no loss reads it.
        grid: side of the patch grid.
        prefix: role of each prefix token: `class`, `distillation` or `register`.
        classes: how many.
        names: of the classes, in order; None where nobody said them.
        width: of each token.
        each: (heads, grid) of each layer of a network that pools its patches; empty where all layers are alike.
    """

    layers: int
    heads: int
    grid: int
    prefix: tuple[str, ...]
    classes: int = 0
    names: tuple[str, ...] | None = None
    width: int = 0
    each: tuple[tuple[int, int], ...] = ()

    @property
    def by_layer(self) -> tuple[tuple[int, int], ...]:
        """(heads, grid) of each layer."""
        return self.each or ((self.heads, self.grid),) * self.layers

    @property
    def maps(self) -> int:
        """Class-row maps, one a layer and head."""
        return sum(heads for heads, _ in self.by_layer)


@dataclass(frozen=True)
class Given:
    """What a store gives a loss: the manifest of a target and that of its teacher."""

    target: Record
    teacher: Record

    @property
    def id(self) -> str:
        """Of the target."""
        return str(self.target["id"])


def student_shape(
    model: nn.Module,
    names: Sequence[str] | None = None,
    *,
    tokens: bool = True,
    attention: bool = True,
    values: bool = False,
) -> Shape:
    """The shape of a student.

    Args:
        model: a plain ViT or PiT; any network where no tokens are read.
        names: of its classes.
        tokens: whether some loss reads its tokens, or its attention.
        attention: whether some loss reads its attention.
        values: whether some loss reads its values, too.

    Raises:
        UserError: attention cannot be read off it, or what is read is not what it attends with (contract 12).
    """
    classes, listed = int(getattr(model, "num_classes", 0)), tuple(names) if names else None
    if not tokens:
        return Shape(0, 0, 0, (), classes, listed)
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    prefix = prefix_roles(model)
    try:
        layers = attention_layers(model, pooled=True)
    except UserError:
        if attention:
            raise
        layers = []
    blocks = layers or token_blocks(model)
    if grid is None or grid[0] != grid[1]:
        raise UserError(f"{type(model).__name__}: its patches make no square grid")
    side, width = int(grid[0]), int(model.num_features)  # type: ignore[arg-type]
    if size is not None and (attention or not layers):
        was = model.training
        ramp = torch.linspace(-1, 1, 2 * 3 * size[0] * size[1]).sin().view(2, 3, *size)
        ramp = ramp.to(next(model.parameters()).device)
        if attention:
            check_attention(model.eval(), ramp, values=values)
        else:
            _require_tokens(model.eval(), blocks, ramp, (len(prefix) + side**2, width))
        model.train(was)
    if not layers:
        return Shape(len(blocks), 0, side, prefix, classes, listed, width)
    sides = layer_grids(model, side)
    each = tuple((int(layer.num_heads), side) for layer, side in zip(layers, sides, strict=True))  # type: ignore[arg-type]
    heads, side = max(each, key=each.count)
    differs = each if len(set(each)) > 1 else ()
    return Shape(len(layers), heads, side, prefix, classes, listed, width, differs)


def _require_tokens(model: nn.Module, blocks: Sequence[nn.Module], images: Tensor, expected: tuple[int, int]) -> None:
    """That each block gives so many tokens of such a width, `[N, D]` of an image. Raises UserError."""
    found: list[tuple[int, ...]] = []
    handles = [
        b.register_forward_hook(lambda module, args, given: found.append(tuple(given.shape[1:]))) for b in blocks
    ]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    if wrong := [shape for shape in found if shape != expected]:
        raise UserError(
            f"{type(model).__name__}: a block of it gives {list(wrong[0])} for an image, where a plain ViT gives all "
            f"{expected[0]} tokens of width {expected[1]}"
        )


@dataclass(frozen=True)
class Row:
    """One line of the printed table."""

    loss: str
    target: str
    teacher: str
    student: str
    rule: str


def table(rows: Sequence[Row]) -> str:
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


# ---------------------------------------------------------------------------------------------- maps and classes


def align_activations(loss: str, given: Given, student: Shape, wanted: int, links: str) -> Row:
    """AAL: every class-row map of the student may be linked to every activation map of the teacher.

    Args:
        loss: its name.
        given: a target of activations.
        student: its shape.
        wanted: side of the grid that the student's maps are brought to, where it is not theirs.
        links: which are trained, in words.

    Raises:
        UserError: the target has another grid (stored maps are never resampled), or no class token.
    """
    manifest = given.target
    identity = manifest["identity"]
    channels, grid = manifest["sample_shape"][0], identity["grid"]
    if grid != wanted:
        raise UserError(
            f"{loss}: target {manifest['id']} has a grid of {grid}x{grid}, the student's patches make "
            f"{wanted}x{wanted}; stored maps are never resampled: precompute with grid={wanted}"
        )
    if "class" not in student.prefix:
        raise UserError(
            f"{loss}: the student has no class token, so no class rows to link; take one that has, such as "
            f"--set student.model={WITH_CLASS}"
        )
    stages = " + ".join(str(stage["channels"]) for stage in manifest["stages"])
    dropped = ", ".join(student.prefix)
    how = ", after the residual sum" * (identity.get("at") == "block") + ", antialiased" * ("antialias" in identity)
    kinds = dict.fromkeys(student.by_layer)
    counts = " + ".join(f"{student.by_layer.count(kind)} layers x {kind[0]} heads" for kind in kinds)
    sides = " and ".join(f"{side}x{side}" for _, side in kinds)
    rows = f"{counts} = {student.maps} class rows of {sides}"
    rows += f", brought to {grid}x{grid} (bicubic)" * any(side != grid for _, side in kinds)
    return Row(
        loss, manifest["id"], f"{channels} maps ({stages}) of {grid}x{grid}{how}", rows,
        f"{links}; keys left out: {dropped}",
    )  # fmt: skip


def align_classes(loss: str, given: Given, student: Shape, same_classes: bool) -> Row:
    """Contract 10: logits meet only a student of the same classes in the same order.

    Raises:
        IdentityError: another number of classes, or other names.
        UserError: a list of names is not known and nobody said that they are the same.
    """
    count, names = given.target["sample_shape"][0], given.teacher["classes"]
    where = f"{loss}: target {given.id}"
    words = ("the student has", "the teacher")
    do = "Logits teach only a student of the same classes, in one order. A teacher of these: pipeline fit-teacher"
    if count != student.classes:
        raise IdentityError(where, "number of classes", student.classes, count, do, words)
    if names and student.names:
        names, own = all_normalized(names), all_normalized(student.names)
        if len(names) != len(own):
            raise IdentityError(where, "names of classes", len(own), len(names), do, words)
        if names != own:
            at = next(i for i, (a, b) in enumerate(zip(own, names, strict=True)) if a != b)
            raise IdentityError(where, f"class {at}", own[at], names[at], do, words)
        said = "the same names"
    elif not same_classes:
        unknown = "the teacher's classes are" if not names else "the student's classes are (no classes.json)"
        raise UserError(
            f"{where}: {unknown} not known by name, so nobody can tell whether class 3 is class 3; if you know that "
            "both lists are the same, in the same order, say --same-classes"
        )
    else:
        said = "taken as the same (--same-classes)"
    return Row(loss, given.id, f"{count} logits of {given.teacher['id']}", f"{student.classes} classes", said)


def full(values: Tensor) -> Tensor:
    """At least f32: what a student gives under autocast is less, and losses are not computed so."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
