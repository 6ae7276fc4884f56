"""A teacher with its taps as one module: what is exported, and what the graph is compared with."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor, nn

from precompute.taps.activations import At, cnn_stages, resize_matrix, stage_maps
from precompute.taps.attention import AttentionLayer, AttentionTaps
from precompute.taps.attention_layers import AttentionLayers, attention_layers
from precompute.taps.probe import run_blank
from precompute.taps.registry import ATTENTION, Tap
from precompute.taps.tokens import prefix_roles, token_blocks
from storage.errors import UserError, setting
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
        self._reads: dict[At, list[_MapsOf]] = {}  # where -> the stages that are read there
        self._kept: dict[tuple[At, int], Tensor] = {}
        self._streams: dict[int, Tensor] = {}  # layer -> residual stream after it
        self.attention: AttentionLayers | None = None
        names, kind = {tap.name for tap in self.taps}, type(model).__name__
        if names & {*ATTENTION}:
            self.attention = attention_layers(model, input_size)
        # Also where no attention is read: the exporter takes kernels of four axes alone, which this sees to.
        self._attention_taps = AttentionTaps(self._chosen_layers() if self.attention else ())
        if "class_token" in names and "class" not in prefix_roles(model):
            raise UserError(f"{kind}: it has no class token")
        if names & {"class_token", "tokens"} and hasattr(self.model, "own_head"):
            hint = f"Give other targets, such as {setting('target', 'class_row')} or embedding."
            raise UserError(
                f"{kind}: without forward_features its tokens after the final norm are not known", hint=hint
            )
        if "logits" in names and not getattr(model, "num_classes", 1):
            raise UserError(f"{kind}: it has no classifier, so it has no logits")
        for n in {n for tap in self.taps if tap.name == "tokens" for n in tap.layers or ()}:
            token_blocks(model)[n - 1].register_forward_hook(functools.partial(_keep_copy, self._streams, n))
        for at in dict.fromkeys(tap.at for tap in self.taps if tap.info.gridded):
            self._reads[at] = self._stages_at(at)
        for tap in self.taps:
            tap.add_matrices(self, (maps.side for maps in self._maps(tap)) if tap.info.gridded else ())

    def _stages_at(self, at: At) -> list[_MapsOf]:
        """The stages of a network that are read at a place, with hooks where timm does not give them."""
        kind = type(self.model).__name__
        if at == "stage":
            if not (shapes := stage_maps(self.model, self.input_size)):
                own = hasattr(self.model, "own_prefix")
                hint = f"Name the modules that give them: {setting('tap_module', 'NAMES')}" if own else ""
                raise UserError(f"{kind}: forward_intermediates gives no square maps of it", hint=hint)
            names = getattr(self.model, "own_maps", [f"forward_intermediates.{i}" for i in range(len(shapes))])
            return [_MapsOf(name, *shape) for name, shape in zip(names, shapes, strict=True)]
        stages = cnn_stages(self.model, at)
        for n, (_, module) in enumerate(stages, 1):
            module.register_forward_hook(functools.partial(_keep_copy, self._kept, (at, n)))
        run_blank(self.model, self.input_size)
        found = []
        for n, (name, _) in enumerate(stages, 1):
            kept = self._kept[at, n]
            if kept.ndim != 4 or kept.shape[-1] != kept.shape[-2]:
                raise UserError(f"{kind}: stage {n} gives {tuple(kept.shape)}, no square maps")
            found.append(_MapsOf(name, kept.shape[1], kept.shape[-1]))
        return found

    def _chosen_layers(self) -> list[AttentionLayer]:
        """The attention layers that some tap reads.

        Raises:
            UserError: a layer or a tap that the network does not have.
        """
        assert self.attention is not None
        layers, kind, chosen = self.attention.layers, type(self.model).__name__, set[int]()
        for tap in self.taps:
            if tap.name in ATTENTION:
                numbers = tap.numbers(len(layers))
                if outside := [n for n in numbers if not 1 <= n <= len(layers)]:
                    raise UserError(f"layer {outside[0]} was asked for; {kind} has layers 1 to {len(layers)}")
                for n in numbers:
                    if reason := _refusal(tap.name, layers[n - 1], self.attention.prefix):
                        raise UserError(f"{kind}: {reason}")
                chosen |= {*numbers}
        return [layers[n - 1] for n in sorted(chosen)]

    def _maps(self, tap: Tap) -> list[_MapsOf]:
        """The stages that a tap's activations are read off."""
        stages = self._reads[tap.at]
        return [stages[n - 1] for n in tap.numbers(len(stages))]

    def stages(self, tap: Tap) -> list[tuple[int, str, int, int]]:
        """(number, name of the module, channels, side) of the stages that a tap's activations are read off."""
        numbers = tap.numbers(len(self._reads[tap.at]))
        return [(n, *maps) for n, maps in zip(numbers, self._maps(tap), strict=True)]

    def scales(self, tap: Tap) -> list[float]:
        """What the scores of each of a tap's layers are multiplied by, usually 1/√d."""
        assert self.attention is not None
        layers = self.attention.layers
        return [layers[n - 1].scale for n in tap.numbers(len(layers))]

    def prepare(self, images: UInt8[Tensor, "B S S 3"]) -> Float32[Tensor, "B 3 I I"]:
        """Normalized input from view images."""
        resize = self._resized if self.resizes else None
        return normalize(images, self.get_buffer("mean"), self.get_buffer("std"), resize)

    def _resized(self, x: Tensor) -> Tensor:
        matrix = self.get_buffer("resize")
        return (matrix @ x @ matrix.T).clamp(0, 1)

    def forward(self, images: UInt8[Tensor, "B S S 3"]) -> tuple[Float[Tensor, "B ..."], ...]:
        """The taps' tensors of view images."""
        x = self.prepare(images)
        with self._attention_taps:
            features = self._features(x)
            return tuple(self._read(tap, features) for tap in self.taps)

    def _features(self, x: Tensor) -> Tensor:
        """What the network's head gets; maps of stages are kept on the way."""
        if "stage" not in self._reads:
            return self.model.forward_features(x)  # type: ignore[operator,no-any-return]
        features, maps = self.model.forward_intermediates(x, output_fmt="NCHW")  # type: ignore[operator]
        self._kept |= {("stage", n): kept for n, kept in enumerate(maps, 1)}
        return features  # type: ignore[no-any-return]

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
            return tap.one_tensor(self, (self._kept[tap.at, n] for n in tap.numbers(len(self._reads[tap.at]))))
        assert self.attention is not None
        taps = self._attention_taps
        seen = {layer.number: attention for layer, attention in zip(taps.layers, taps.attention, strict=True)}
        layers = [seen[n] for n in tap.numbers(len(self.attention.layers))]
        match tap.name:
            case "class_row":
                at = self.attention.class_query
                return torch.stack([layer.rows(slice(at, at + 1))[:, :, 0] for layer in layers], 1)
            case "attention":
                return torch.stack([layer.rows() for layer in layers], 1)
        return torch.stack([getattr(layer, tap.name) for layer in layers], 1)


class _MapsOf(NamedTuple):
    """Maps of a stage: the name of what gives them, how many there are, and their side."""

    name: str
    channels: int
    side: int


def _refusal(tap: str, layer: AttentionLayer, prefix: tuple[str, ...]) -> str | None:
    """Why a layer does not have a tap."""
    where = f"its attention layer {layer.number}"
    if tap == "class_row" and "class" not in prefix:
        return "it has no class token, so it has no class row"
    if tap != "class_row" and tap != "v" and layer.queries == 1:
        return f"in {where} the class token alone attends, so there is only its row (class_row)"
    if tap in ("q", "k") and not layer.fused:
        return f"{where} calls no attention kernel, so its {tap} is not known; class_row and attention are"
    if tap in ("q", "k") and layer.biased:
        return (
            f"{where} adds a bias to its scores, such as relative positions, so q and k alone do not give its "
            "attention; class_row and attention do"
        )
    return None


def _keep_copy(kept: dict[Any, Tensor], number: Any, _module: nn.Module, _args: Any, output: Tensor) -> None:
    kept[number] = output.clone()  # a ResNet adds the shortcut to it in place
