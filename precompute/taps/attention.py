"""Attention of plain ViTs, and of PiT, which pools its patches: q, k and v by hooks, and the rows that they give."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from storage.errors import UserError

_CONVOLUTION = ("kernel_size", "stride", "padding")


def attention_layers(model: nn.Module, *, pooled: bool = False) -> list[nn.Module]:
    """The attention modules of a plain ViT, first layer first.

    Args:
        model: the network.
        pooled: PiT will do too, whose layers have other heads and patches after each pooling.

    Raises:
        UserError: the network has none whose queries and keys can be read, naming what it has instead.
    """
    name = type(model).__name__
    blocks = getattr(model, "blocks", None)
    if stages := _pooled_stages(model):
        if not pooled:
            raise UserError(
                f"{name}: it pools its patches between layers, so the attention of its layers has no common shape"
            )
        blocks = nn.ModuleList(block for stage in stages for block in stage.blocks)  # type: ignore[union-attr]
    if not isinstance(blocks, nn.Sequential | nn.ModuleList) or not all(hasattr(b, "attn") for b in blocks):
        why = "its attention is windowed" if hasattr(model, "layers") else "it has no list of attention blocks"
        raise UserError(f"{name}: no attention rows over all tokens can be read off it: {why}")
    layers: list[nn.Module] = [getattr(block, "attn") for block in blocks]  # noqa: B009
    for i, layer in enumerate(layers, 1):
        missing = [part for part in ("q_norm", "k_norm", "attn_drop", "num_heads", "scale") if not hasattr(layer, part)]
        if missing:
            kind = f"{type(layer).__module__}.{type(layer).__name__}"
            raise UserError(
                f"{name}: layer {i} is a {kind}, whose queries and keys cannot be read (no {', '.join(missing)}); "
                "only plain softmax(q·k/√d) attention can be tapped"
            )
    return layers


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


def _pooled_stages(model: nn.Module) -> list[nn.Module]:
    """The stages of PiT, each with `pool` before its `blocks`; empty for other networks."""
    stages = getattr(model, "transformers", None)
    if not isinstance(stages, nn.Sequential) or not all(hasattr(s, "blocks") and hasattr(s, "pool") for s in stages):
        return []
    return list(stages)


def layer_grids(model: nn.Module, side: int) -> list[int]:
    """The side of the patch grid in each attention layer: the same in a plain ViT, less after each pooling of PiT.

    Args:
        model: whose `attention_layers` can be read.
        side: of the grid that the patch embedding makes.
    """
    grids: list[int] = []
    for stage in _pooled_stages(model):
        if (pool := getattr(stage, "pool", None)) is not None:
            (kernel, _), (stride, _), (padding, _) = (getattr(pool.conv, part) for part in _CONVOLUTION)
            side = (side + 2 * padding - kernel) // stride + 1
        grids += [side] * len(stage.blocks)  # type: ignore[arg-type]
    return grids or [side] * len(attention_layers(model))


def prefix_roles(model: nn.Module) -> tuple[str, ...]:
    """The role of each prefix token: `class`, `distillation` or `register`, in the order of the sequence."""
    if _pooled_stages(model):  # both tokens are in one parameter
        return ("class", "distillation")[: model.cls_token.shape[1]]  # type: ignore[index]
    count = int(getattr(model, "num_prefix_tokens", 0))
    roles = []
    if getattr(model, "cls_token", None) is not None:
        roles.append("class")
    if getattr(model, "dist_token", None) is not None:
        roles.append("distillation")
    return (*roles, *["register"] * (count - len(roles)))


def class_scores(q: Float[Tensor, "B H _Q d"], k: Float[Tensor, "B H N d"], scale: float) -> Float[Tensor, "B H N"]:
    """What the class query's attention is the softmax of: q₀·kᵀ·scale; arguments as for `class_row`."""
    return torch.einsum("bhd,bhnd->bhn", q[:, :, 0] * scale, k)


def class_row(q: Float[Tensor, "B H _Q d"], k: Float[Tensor, "B H N d"], scale: float) -> Float[Tensor, "B H N"]:
    """The class query's attention over all tokens, softmax(q₀·kᵀ·scale).

    Args:
        q: queries after their norm; token 0 is the class token, and no other is looked at.
        k: keys after their norm.
        scale: 1/√d of the layer.

    Returns:
        Each row sums to one.
    """
    return class_scores(q, k, scale).softmax(-1)


def attention_rows(q: Float[Tensor, "B H Q d"], k: Float[Tensor, "B H N d"], scale: float) -> Float[Tensor, "B H Q N"]:
    """Every query's attention over all tokens, softmax(q·kᵀ·scale); arguments as for `class_row`."""
    return attention_scores(q, k, scale).softmax(-1)


def attention_scores(
    q: Float[Tensor, "B H Q d"], k: Float[Tensor, "B H N d"], scale: float
) -> Float[Tensor, "B H Q N"]:
    """What these rows are the softmax of: q·kᵀ·scale; arguments as for `class_row`."""
    return q * scale @ k.transpose(-2, -1)


class AttentionTaps:
    """Reads q and k of chosen layers by hooks after their norms, with the attention kernel left in place.

    Args:
        model: a plain ViT, or PiT.
        layers: which, from 1; all by default.
        values: also v.

    After each forward pass `q`, `k` and `v` hold `[B, H, N, d]` for each chosen layer, with gradients where there are
    any.

    Raises:
        UserError: no such layer, or values that are asked for and cannot be read.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int] | None = None, *, values: bool = False) -> None:
        modules = attention_layers(model, pooled=True)
        self.layers = tuple(layers or range(1, len(modules) + 1))
        outside = [n for n in self.layers if not 1 <= n <= len(modules)]
        if outside:
            raise UserError(f"layer {outside[0]} was asked for; {type(model).__name__} has layers 1 to {len(modules)}")
        chosen = [modules[n - 1] for n in self.layers]
        self.scales = [float(getattr(m, "scale")) for m in chosen]  # noqa: B009
        self.heads = [int(getattr(m, "num_heads")) for m in chosen]  # noqa: B009
        self._q: dict[int, Tensor] = {}
        self._k: dict[int, Tensor] = {}
        self._qkv: dict[int, Tensor] = {}
        self._handles = []
        for n, module in zip(self.layers, chosen, strict=True):
            for part, kept in (("q_norm", self._q), ("k_norm", self._k)):
                hook = functools.partial(_keep, kept, n)
                self._handles.append(getattr(module, part).register_forward_hook(hook))
            if values:
                if not isinstance(joint := getattr(module, "qkv", None), nn.Module):
                    kind = f"{type(module).__module__}.{type(module).__name__}"
                    raise UserError(f"{type(model).__name__}: layer {n} is a {kind}, whose values cannot be read")
                self._handles.append(joint.register_forward_hook(functools.partial(_keep, self._qkv, n)))

    @property
    def q(self) -> list[Tensor]:
        """Queries of the last forward pass, a tensor a layer."""
        return [self._q[n] for n in self.layers]

    @property
    def k(self) -> list[Tensor]:
        """Keys of the last forward pass, a tensor a layer."""
        return [self._k[n] for n in self.layers]

    @property
    def v(self) -> list[Tensor]:
        """Values of the last forward pass, a tensor a layer: the last third of the joint projection."""
        values = []
        for n, heads in zip(self.layers, self.heads, strict=True):
            batch, tokens, width = self._qkv[n].shape
            values.append(self._qkv[n].reshape(batch, tokens, 3, heads, width // (3 * heads))[:, :, 2].transpose(1, 2))
        return values

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self.clear()

    def clear(self) -> None:
        """Let go of what the last forward pass left; a compiled network is then not compiled again for it."""
        self._q.clear()
        self._k.clear()
        self._qkv.clear()


def _keep(kept: dict[int, Tensor], number: int, _module: nn.Module, _args: Any, output: Tensor) -> None:
    kept[number] = output
