"""A teacher with its taps as one module: what is exported, and what the graph is compared with."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor, nn

from precompute.taps.activations import At, cnn_stages, resize_matrix
from precompute.taps.attention import (
    AttentionTaps,
    attention_layers,
    attention_rows,
    class_row,
    prefix_roles,
)
from precompute.taps.registry import ATTENTION, OF_CLASS_TOKEN, Tap
from storage.errors import UserError
from storage.views.normalize import normalize


class TappedTeacher(nn.Module):
    """A teacher from view images to its taps: resizing, normalization, network and taps in one graph.

    Args:
        model: a timm network, in eval mode.
        taps: what to read, in the order of the outputs.
        view_size: S, the side of the view images.
        input_size: the side of the network's own input.
        mean: of the network's input, per channel, for pixels in [0, 1].
        std: likewise.
    """

    def __init__(
        self,
        model: nn.Module,
        taps: Sequence[Tap],
        view_size: int,
        *,
        input_size: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.model = model
        self.taps = tuple(taps)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        self.input_size = input_size
        self.resizes = view_size != input_size
        if self.resizes:
            self.register_buffer("resize", resize_matrix(view_size, input_size, view_size > input_size))
        self._stages: dict[At, list[tuple[str, nn.Module]]] = {}
        self._kept: dict[tuple[At, int], Tensor] = {}
        self._shapes: dict[tuple[At, int], tuple[int, int]] = {}  # channels and side of a stage's maps
        self._attention: AttentionTaps | None = None
        names, kind = {tap.name for tap in self.taps}, type(model).__name__
        self._streams: dict[int, Tensor] = {}  # layer -> residual stream after it
        if names & {*ATTENTION}:
            everything = range(1, len(attention_layers(model)) + 1)
            wanted = {n for tap in self.taps if tap.name in ATTENTION for n in tap.layers or everything}
            self._attention = AttentionTaps(model, sorted(wanted), values="v" in names)
        if names & {*OF_CLASS_TOKEN} and "class" not in prefix_roles(model):
            raise UserError(f"{kind}: it has no class token, so it has no class row")
        if "logits" in names and not getattr(model, "num_classes", 1):
            raise UserError(f"{kind}: it has no classifier, so it has no logits")
        if "tokens" in names:
            attention_layers(model)  # raises where there is no list of blocks
            for n in {n for tap in self.taps if tap.name == "tokens" for n in tap.layers or ()}:
                model.blocks[n - 1].register_forward_hook(functools.partial(_keep_copy, self._streams, n))  # type: ignore[index,union-attr]
        for at in dict.fromkeys(tap.at for tap in self.taps if tap.info.gridded):
            self._stages[at] = cnn_stages(model, at)
            for n, (_, module) in enumerate(self._stages[at], 1):
                module.register_forward_hook(functools.partial(_keep_copy, self._kept, (at, n)))
        if self._stages:
            self._prepare_grids()

    def stages(self, tap: Tap) -> list[tuple[int, str, int]]:
        """(number, name of the module, channels) of the stages that a tap's activations are read off."""
        names = [name for name, _ in self._stages[tap.at]]
        return [(n, names[n - 1], self._shapes[tap.at, n][0]) for n in tap.layers or range(1, len(names) + 1)]

    def scales(self, tap: Tap) -> list[float]:
        """1/√d of each of a tap's layers."""
        assert self._attention is not None
        known = dict(zip(self._attention.layers, self._attention.scales, strict=True))
        return [known[n] for n in tap.layers or self._attention.layers]

    def _prepare_grids(self) -> None:
        """The matrices that bring each stage's maps to each grid, made outside of `forward` as constants."""
        with torch.no_grad():
            self.model(torch.zeros(1, 3, self.input_size, self.input_size, device=next(self.model.parameters()).device))
        for (at, n), kept in self._kept.items():
            if kept.ndim != 4 or kept.shape[-1] != kept.shape[-2]:
                raise UserError(f"{type(self.model).__name__}: stage {n} gives {tuple(kept.shape)}, no square maps")
            self._shapes[at, n] = (kept.shape[1], kept.shape[-1])
            for tap in self.taps:
                side = kept.shape[-1]
                if tap.info.gridded and tap.at == at and not hasattr(self, tap.grid_name(side)):
                    self.register_buffer(tap.grid_name(side), tap.grid_matrix(side))

    def prepare(self, images: UInt8[Tensor, "B S S 3"]) -> Float32[Tensor, "B 3 I I"]:
        """Normalized input from view images."""
        resize = self._resized if self.resizes else None
        return normalize(images, self.get_buffer("mean"), self.get_buffer("std"), resize)

    def _resized(self, x: Tensor) -> Tensor:
        matrix = self.get_buffer("resize")
        return (matrix @ x @ matrix.T).clamp(0, 1)

    def forward(self, images: UInt8[Tensor, "B S S 3"]) -> tuple[Float[Tensor, "B ..."], ...]:
        """The taps' tensors of view images."""
        features = self.model.forward_features(self.prepare(images))  # type: ignore[operator]
        return tuple(self._read(tap, features) for tap in self.taps)

    def _read(self, tap: Tap, features: Tensor) -> Tensor:
        if tap.name == "logits":
            return self.model.forward_head(features)  # type: ignore[operator,no-any-return]
        if tap.name == "embedding":
            return self.model.forward_head(features, pre_logits=True)  # type: ignore[operator,no-any-return]
        if tap.name == "class_token":
            return features[:, 0]
        if tap.name == "tokens":
            return torch.stack([self._streams[n] for n in tap.layers] if tap.layers else [features], 1)
        if tap.name == "activations":
            maps = []
            for n in tap.layers or range(1, len(self._stages[tap.at]) + 1):
                matrix = self.get_buffer(tap.grid_name(self._shapes[tap.at, n][1]))
                maps.append(matrix @ self._kept[tap.at, n] @ matrix.T)
            return torch.cat(maps, 1)
        assert self._attention is not None
        chosen = [self._attention.layers.index(n) for n in tap.layers or self._attention.layers]
        q, k, scales = self._attention.q, self._attention.k, self._attention.scales
        if tap.name == "class_row":
            return torch.stack([class_row(q[i], k[i], scales[i]) for i in chosen], 1)
        if tap.name == "attention":
            return torch.stack([attention_rows(q[i], k[i], scales[i]) for i in chosen], 1)
        read = {"q": q, "k": k}[tap.name] if tap.name != "v" else self._attention.v
        return torch.stack([read[i] for i in chosen], 1)


def _keep_copy(kept: dict[Any, Tensor], number: Any, _module: nn.Module, _args: Any, output: Tensor) -> None:
    kept[number] = output.clone()  # a ResNet adds the shortcut to it in place
