"""Which layers of a network attend over all its tokens, found by running it once."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor, nn

from precompute.taps.activations import stage_maps
from precompute.taps.attention import Attention, AttentionLayer, AttentionTaps, tensors_of
from precompute.taps.probe import IMAGES, once_per_network, run_blank
from precompute.taps.tokens import prefix_roles, unknown_prefix, wrong_prefix
from storage.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionLayers:
    """The layers of a network whose attention can be read.

    Attributes:
        layers: first one first.
        prefix: the role of each token before the patches, as in `prefix_roles`.
    """

    layers: tuple[AttentionLayer, ...]
    prefix: tuple[str, ...]

    @property
    def grids(self) -> tuple[int, ...]:
        """Side of the patch grid in each layer."""
        return tuple(_side(layer.tokens - len(self.prefix)) for layer in self.layers)

    @property
    def class_query(self) -> int:
        """Which of the queries is the class token's."""
        return 0 if self.layers[0].queries == 1 else self.prefix.index("class")


@once_per_network
def attention_layers(model: nn.Module, size: int, *, pooled: bool = False) -> AttentionLayers:
    """The layers that attend over all tokens of an image; of networks without such, those of their class attention.

    The network runs once, on images without content, in eval mode; on the meta device this takes no time.

    Args:
        model: any network.
        size: side of its input.
        pooled: networks that pool their patches between layers, and attend over all of them in every layer, will do
            too (PiT); their layers have unlike heads and grids.

    Raises:
        UserError: there are none, with the reason.
    """
    prefix, seen = prefix_roles(model), _Calls()
    named = hasattr(model, "own_maps")  # maps of modules that the user names say nothing of how it attends
    sides = set() if named else {side for _, side in stage_maps(model, size)}
    with seen:
        run_blank(model, size)
    if seen.calls and getattr(model, "own_prefix", ()) is None:
        raise unknown_prefix(f"{type(model).__name__}: it attends over tokens")
    calls = [layer for i, call in enumerate(seen.calls) if (layer := _layer(call, i))]
    over_all = [
        layer
        for layer in calls
        if layer.queries == layer.tokens and (side := _side(layer.tokens - len(prefix))) and side in (sides or {side})
    ]
    # windows have one side in every stage; patches that are pooled have that of the stage
    of_stages = len(over_all) == len(seen.calls) and {_side(n.tokens - len(prefix)) for n in over_all} == sides
    if over_all and (len(sides) < 2 or (pooled and of_stages)):
        return _numbered(over_all, prefix)
    of_class = [layer for layer in calls if layer.queries == 1 and _side(layer.tokens - 1)]
    if of_class:
        last = of_class[-1]
        return _numbered([n for n in of_class if (n.heads, n.tokens) == (last.heads, last.tokens)], ("class",))
    reason = "its attention is in windows, or not over patches"
    if not seen.calls:
        reason = "it calls no attention kernel, and multiplies no softmax with values"
    elif getattr(model, "own_prefix", ()) and calls and not any(_side(n.tokens - len(prefix)) for n in calls):
        raise UserError(wrong_prefix(type(model).__name__, max(layer.tokens for layer in calls), prefix))
    elif len(sides) > 1:
        reason = f"it pools its patches between layers ({', '.join(map(str, sorted(sides, reverse=True)))} a side)"
    raise UserError(f"{type(model).__name__}: it has no attention over all tokens of an image: {reason}")


def _numbered(layers: list[AttentionLayer], prefix: tuple[str, ...]) -> AttentionLayers:
    return AttentionLayers(layers=tuple(replace(layer, number=n) for n, layer in enumerate(layers, 1)), prefix=prefix)


def _layer(call: Attention, place: int) -> AttentionLayer | None:
    """What a call of two images says of its layer; None where it is no attention of heads over tokens."""
    rows = call.raw_scores if call.q is None else call.q
    values = call.v
    if rows is None or values is None or rows.ndim != 4 or values.ndim != 4:
        return None
    heads, rest = divmod(rows.shape[0] * rows.shape[1], IMAGES)
    if rest or values.shape[:2] != rows.shape[:2] or (call.k is not None and call.k.shape[:3] != values.shape[:3]):
        return None
    return AttentionLayer(
        number=0,
        call=place,
        heads=heads,
        queries=rows.shape[2],
        tokens=values.shape[2],
        scale=float(call.scale),
        fused=call.q is not None,
        biased=call.bias is not None,
    )


class _Calls(AttentionTaps):
    """Every attention call of a pass, without values."""

    def __init__(self) -> None:
        super().__init__(())
        self.calls: list[Attention] = []

    def _keep(self, _call: int, attention: Attention, _rows: Tensor | None) -> None:
        self.calls.append(replace(attention, **{name: t.to("meta") for name, t in tensors_of(attention).items()}))

    def _meet_values(self, call: int, values: Tensor, output: Tensor) -> Tensor:
        self.calls[call] = replace(self.calls[call], v=values.to("meta"))
        return output


def _side(patches: int) -> int:
    """The side of a square grid of so many patches; 0 where there is none."""
    side = math.isqrt(max(0, patches))
    return side if side**2 == patches else 0
