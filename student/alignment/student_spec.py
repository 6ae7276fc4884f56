"""A student's shape as losses need it: its layers, heads, grid, prefix tokens and classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from precompute.taps import (
    AttentionLayers,
    attention_layers,
    check_attention,
    image_size,
    prefix_roles,
    run_blank,
    token_blocks,
)
from storage.errors import UserError
from student.alignment.stages import StudentStage, student_stages
from student.alignment.student_taps import StudentTaps, class_index, embedding_width


@dataclass(frozen=True)
class StudentSpec:
    """A student's shape as losses need it.

    PiT pools its patches, so its layers differ: `each` has them, and `heads` and `grid` are those of most layers.

    Attributes:
        layers: number of layers, or of stages; 0 where no loss reads tokens.
        heads: in each layer; 0 where attention cannot be read, and no loss reads it.
        grid: side of the patch grid.
        prefix: role of each prefix token: `class`, `distillation` or `register`.
        classes: number of classes.
        names: of the classes, in order; None where they are not known.
        width: of each token; of the embedding where no loss reads tokens.
        each: (heads, grid) of each layer of a network that pools its patches; empty where all layers are alike.
        attention: the layers whose attention is read; None where no loss reads it.
        pooled: width of the pooled features that stand for the class token; 0 where there is one, or none is read.
        stages: of a network without tokens, whose maps are read in their place; else empty.
    """

    layers: int
    heads: int
    grid: int
    prefix: tuple[str, ...]
    classes: int = 0
    names: tuple[str, ...] | None = None
    width: int = 0
    each: tuple[tuple[int, int], ...] = ()
    attention: AttentionLayers | None = None
    pooled: int = 0
    stages: tuple[StudentStage, ...] = ()

    @property
    def by_layer(self) -> tuple[tuple[int, int], ...]:
        """(heads, grid) of each layer."""
        return self.each or ((self.heads, self.grid),) * self.layers

    @property
    def maps(self) -> int:
        """Number of class-row maps, one for each layer and head."""
        return sum(heads for heads, _ in self.by_layer)


def student_spec(
    model: nn.Module,
    names: Sequence[str] | None = None,
    *,
    tokens: bool = True,
    attention: bool = True,
    maps: bool = False,
    embedding: bool = False,
    size: int | None = None,
) -> StudentSpec:
    """The shape of a student.

    Args:
        model: any network whose attention can be read, or whose blocks give all tokens; any where no tokens are read.
        names: of its classes.
        tokens: whether some loss reads its tokens, or its attention.
        attention: whether some loss reads its attention, or its values.
        maps: whether maps of its stages will do in place of tokens, where it has none.
        embedding: whether some loss reads its embedding.
        size: side of its input; None: the one that it was made for.

    Raises:
        UserError: attention cannot be read, or what is read is not what the student attends with (contract 12).
    """
    spec = StudentSpec(0, 0, 0, (), int(getattr(model, "num_classes", 0)), tuple(names) if names else None)
    size = size or image_size(model)
    if tokens:
        try:
            spec = _with_tokens(model, spec, attention)
        except UserError as error:
            if not maps:
                raise
            try:
                stages = student_stages(model, size)
            except UserError as other:
                raise UserError(f"{error.message}; {other.message}") from None
            spec = replace(spec, layers=len(stages), stages=stages)
    if embedding:
        width, is_pooled = embedding_width(model, size), class_index(model) is None
        spec = replace(spec, width=spec.width or width, pooled=width if is_pooled else 0)
    return spec


def _with_tokens(model: nn.Module, spec: StudentSpec, attention: bool) -> StudentSpec:
    """The shape with layers, heads, grid and prefix tokens. Raises UserError: tokens, or attention, cannot be read."""
    size, width = image_size(model), int(model.num_features)  # type: ignore[arg-type]
    try:
        attending: AttentionLayers | None = attention_layers(model, size, pooled=True)
    except UserError:
        if attention:
            raise
        attending = None
    if attending is None:
        prefix, grid = prefix_roles(model), getattr(getattr(model, "patch_embed", None), "grid_size", None)
        blocks = token_blocks(model)
        if grid is None or grid[0] != grid[1]:
            raise UserError(f"{type(model).__name__}: its patches make no square grid")
        _require_tokens(model, size, (len(prefix) + grid[0] ** 2, width))
        return replace(spec, layers=len(blocks), grid=int(grid[0]), prefix=prefix, width=width)
    if attention:
        ramp, training = torch.linspace(-1, 1, 2 * 3 * size**2).sin().view(2, 3, size, size), model.training
        check_attention(model.eval(), ramp.to(next(model.parameters()).device), attending)
        model.train(training)
    each = tuple((layer.heads, side) for layer, side in zip(attending.layers, attending.grids, strict=True))
    heads, side = max(each, key=each.count)
    each = each if len(set(each)) > 1 else ()
    return replace(
        spec,
        layers=len(attending.layers),
        heads=heads,
        grid=side,
        prefix=attending.prefix,
        width=width,
        each=each,
        attention=attending,
    )


def _require_tokens(model: nn.Module, size: int, expected: tuple[int, int]) -> None:
    """Require `expected` tokens `[N, D]` of an image from each block. Raises UserError."""
    taps = StudentTaps(model, {"streams"})
    try:
        run_blank(model, size)
    finally:
        taps.remove()
    if wrong := [shape for stream in taps.streams if (shape := tuple(stream.shape[1:])) != expected]:
        raise UserError(
            f"{type(model).__name__}: one of its blocks gives {list(wrong[0])} for an image, where a plain ViT gives "
            f"all {expected[0]} tokens of width {expected[1]}"
        )
