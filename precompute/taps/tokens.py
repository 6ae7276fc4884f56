"""Tokens of a ViT: the blocks, each of which gives all of them, and the roles of those before the patches."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from storage.errors import UserError, setting


def token_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a plain ViT, each of which gives all tokens; however it attends.

    Raises:
        UserError: the network has no such blocks.
    """
    blocks = getattr(model, "blocks", None)
    plain = isinstance(blocks, nn.Sequential | nn.ModuleList) and all(hasattr(block, "attn") for block in blocks)
    if not plain or not hasattr(model, "patch_embed"):
        raise UserError(f"{type(model).__name__}: it is not a plain ViT, whose blocks keep one token for each patch")
    return list(blocks)  # type: ignore[arg-type]


def prefix_roles(model: nn.Module) -> tuple[str, ...]:
    """The role of each prefix token: `class`, `distillation` or `register`, in the order of the sequence."""
    if (own := getattr(model, "own_prefix", None)) is not None:  # of a network outside timm
        return tuple(own)
    class_token = getattr(model, "cls_token", None)
    count = getattr(model, "num_prefix_tokens", None)
    if count is None:  # PiT has both tokens in one parameter
        count = class_token.shape[1] if isinstance(class_token, Tensor) and class_token.ndim == 3 else 0
        return ("class", "distillation")[:count]
    roles = ["class"] if class_token is not None else []
    roles += ["distillation"] if getattr(model, "dist_token", None) is not None else []
    return (*roles, *["register"] * (int(count) - len(roles)))


def wrong_prefix(owner: str, tokens: int, prefix: Sequence[str]) -> str:
    """The message that tokens without their prefix are no square."""
    first = ", ".join(prefix) or "none"
    rest = f"without the prefix ({first}) {tokens - len(prefix)} are left, which is not a square grid"
    return f"{owner}: it has {tokens} tokens; {rest}"


def unknown_prefix(what: str) -> UserError:
    """The error that nobody says which tokens come before the patches."""
    return UserError(
        f"{what}, and it is unknown which of them come before the patches",
        hint="Set num_prefix_tokens on the network (1: a class token). "
        f"For a teacher {setting('prefix', 'class,register')} or {setting('prefix', 'none')} will do, too.",
    )
