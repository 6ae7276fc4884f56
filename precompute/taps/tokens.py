"""Blocks of a ViT, each of which gives all tokens."""

from __future__ import annotations

from torch import nn

from storage.errors import UserError


def token_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a plain ViT, each of which gives all tokens; however it attends.

    Raises:
        UserError: the network has no such blocks.
    """
    blocks = getattr(model, "blocks", None)
    plain = isinstance(blocks, nn.Sequential | nn.ModuleList) and all(hasattr(block, "attn") for block in blocks)
    if not plain or not hasattr(model, "patch_embed"):
        raise UserError(f"{type(model).__name__}: it is no plain ViT, whose blocks keep one token for each patch")
    return list(blocks)  # type: ignore[arg-type]
