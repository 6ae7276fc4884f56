"""Hooks that replace a network's attention by another's."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Self

import torch
from pydantic import Field, Strict, model_validator
from torch import Tensor, nn

from precompute.taps import AttentionLayers, AttentionTaps, attention_layers, image_size, run_blank, token_blocks
from storage.errors import UserError, call
from storage.objects.record_schema import Count, Id, Schema, Several, Sha256, Size
from student.settings import AttentionCopyConfig

COPIED = "copied."  # what tensors that every image gets are called in a student's file

Copied = Mapping[str, Tensor]  # `map`, `q`, `k` or `v` -> [B, L, h, N, …] of the layers and heads that are copied


class AttentionCopyRecord(Schema):
    """What a student's file says of what it copies: `student.attention_copy.inference.record_of`."""

    layers: Annotated[Several[Count], Field(min_length=1)]
    heads: Size
    settings: AttentionCopyConfig
    store: str
    teacher: str
    targets: Annotated[Several[Id], Field(min_length=1)]
    graphs: Several[Annotated[tuple[Sha256, Count], Strict(False)]]
    permute: int | None

    @model_validator(mode="after")
    def _graphs(self) -> Self:
        if len(self.graphs) != len(self.targets):
            raise ValueError(f"graphs: expected one for each of {len(self.targets)} targets, found {len(self.graphs)}")
        return self


class AttentionCopyHooks:
    """The places of a student where copied attention goes in.

    A student that it is attached to does not run before it is told what to attend with.

    Args:
        tensors: `map`, `q`, `k`, `v` or `qk`.
        layers: of the student, from 1.
        heads: how many, the first ones; the others go on with their own.

    Attributes:
        fixed: what every image gets, `[1, L, h, N, …]`; empty where each has its own.
        source: `student.attention_copy.inference.StoredAttention`, of images that are evaluated; None until attached.
    """

    def __init__(self, tensors: str, layers: Sequence[int], heads: int) -> None:
        self.parts = (tensors,) if tensors == "map" else tuple(tensors)
        self.layers, self.heads = tuple(layers), heads
        self.fixed: Copied = {}
        self.source: Any = None
        self._current: Copied = {}

    def attach(self, model: nn.Module) -> None:
        """Put the hooks on a plain ViT; whole maps go in where probabilities are, so these layers are unfused."""
        layers = _copying_layers(model, self.parts)
        for at, n in enumerate(self.layers):
            layer: Any = layers[n - 1]
            if "map" in self.parts:
                layer.fused_attn, layer.copies_maps = False, True
                layer.attn_drop.register_forward_pre_hook(functools.partial(self._map, at, layer))
            for part in {"q", "k"} & {*self.parts}:
                getattr(layer, f"{part}_norm").register_forward_hook(functools.partial(self._vectors, part, at))
            if "v" in self.parts:
                layer.qkv.register_forward_hook(functools.partial(self._values, at, layer.num_heads))
        model.teacher_copies = self  # type: ignore[assignment]

    @contextmanager
    def attending(self, copied: Copied) -> Iterator[None]:
        """Within this context the student attends with `copied`."""
        self._current = copied
        try:
            yield
        finally:
            self._current = {}

    def _of(self, part: str, at: int, own: Tensor) -> Tensor:
        """What goes in place of a layer's own `[B, H, N, …]`, its other heads with it."""
        copied = (self._current or self.fixed).get(part)
        if copied is None:
            raise UserError(
                f"this student attends with its teacher's {'attention' if part == 'map' else part} in "
                f"{len(self.layers)} layer(s), and nothing gives it here",
                hint=f"{call('predict')} gives it, and {call('evaluate')} for accuracies.",
            )
        new = copied[:, at].to(own).expand(len(own), *copied.shape[2:])
        return new if self.heads == own.shape[1] else torch.cat([new, own[:, self.heads :]], 1)

    def _map(self, at: int, _layer: Any, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self._of("map", at, args[0]),)

    def _vectors(self, part: str, at: int, _module: nn.Module, _args: Any, own: Tensor) -> Tensor:
        return self._of(part, at, own)

    def _values(self, at: int, heads: int, _module: nn.Module, _args: Any, own: Tensor) -> Tensor:
        """The last third of the joint projection `[B, N, 3·H·d]`."""
        width = own.shape[-1] // 3
        values = own[..., 2 * width :].reshape(*own.shape[:2], heads, width // heads).transpose(1, 2)
        return torch.cat([own[..., : 2 * width], self._of("v", at, values).transpose(1, 2).flatten(2)], -1)


def _copying_layers(model: nn.Module, parts: Sequence[str]) -> list[Any]:
    """The attention modules of a plain ViT, in which attention can be replaced.

    Raises:
        UserError: a network of another kind, or one that changes q and k once more before they meet, by rotation.
    """
    kind, size = type(model).__name__, image_size(model)
    attending = attention_layers(model, size, pooled=True)
    layers = [getattr(block, "attn", None) for block in token_blocks(model)]
    needed = ["attn_drop"] * ("map" in parts) + ["q_norm", "k_norm"] * ("q" in parts) + ["qkv"] * ("v" in parts)
    missing = {part for layer in layers for part in needed if not isinstance(getattr(layer, part, None), nn.Module)}
    if missing or len(layers) != len(attending.layers):
        what = f" (no {', '.join(sorted(missing))})" if missing else ""
        raise UserError(f"{kind}: attention cannot be copied into its layers{what}; only a plain ViT's can be replaced")
    if {"q", "k"} & {*parts}:
        _require_last_norms(model, size, attending, layers)
    return layers


def _require_last_norms(model: nn.Module, size: int, attending: AttentionLayers, layers: Sequence[Any]) -> None:
    """Require that the kernel gets what the norms of q and k give, and nothing is added to their product."""
    normed: dict[tuple[int, str], Tensor] = {}
    handles = [
        getattr(layer, f"{part}_norm").register_forward_hook(
            lambda _module, _args, output, key=(n, part): normed.__setitem__(key, output)
        )
        for n, layer in enumerate(layers)
        for part in ("q", "k")
    ]
    taps = AttentionTaps(attending.layers)
    with taps:
        run_blank(model, size)
    for handle in handles:
        handle.remove()
    for n, (layer, attention) in enumerate(zip(attending.layers, taps.attention, strict=True)):
        if layer.biased or attention.q is not normed[n, "q"] or attention.k is not normed[n, "k"]:
            raise UserError(
                f"{type(model).__name__}: layer {layer.number} changes q and k after their norms, or their product, by "
                "rotation or relative positions, so a teacher's cannot take their place; maps can"
            )


def attention_copy_hooks(model: nn.Module) -> AttentionCopyHooks | None:
    """The copies that are attached to a student."""
    hooks = getattr(model, "teacher_copies", None)
    return hooks if isinstance(hooks, AttentionCopyHooks) else None
