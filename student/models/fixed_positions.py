"""Position embeddings that are not trained: a table of sines and cosines, as MAE's and AttnDistill's students have."""

from __future__ import annotations

import math

import torch
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor, nn

from storage.errors import UserError, setting

SINCOS = "sincos"  # what `student.args.pos_embed` calls them; timm has trained ones alone


def fix_positions(model: nn.Module) -> None:
    """Give a new network MAE's table of sines and cosines, and do not train it; tokens before the patches get zeros.

    In the state dict it is what trained embeddings are, so bare timm loads it.

    Raises:
        UserError: the network adds no position embeddings to patches of a grid, or its width is not a multiple of four.
    """
    positions, grid = getattr(model, "pos_embed", None), getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if not isinstance(positions, nn.Parameter) or positions.ndim != 3 or not grid:
        leave = setting("student.args.pos_embed", "null")
        problem = f"student.args.pos_embed: {type(model).__name__} adds no position embeddings to its patches"
        raise UserError(problem, hint=f"Leave it out: {leave}")
    width = positions.shape[-1]
    if width % 4:
        wide = setting("student.embed_dim", 4 * max(1, round(width / 4)))
        raise UserError(f"student.args.pos_embed: {SINCOS} needs a width of 4·n, this is {width}", hint=f"Give {wide}")
    with torch.no_grad():
        positions.zero_()
        rows_first: Tensor = build_sincos2d_pos_embed(list(grid), width, interleave_sin_cos=True)
        positions[0, -math.prod(grid) :] = rows_first.roll(width // 2, -1)  # MAE has sines and cosines of columns first
    positions.requires_grad_(False)
