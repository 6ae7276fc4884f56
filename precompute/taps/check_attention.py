"""Contract 12: what is tapped of attention is what the network uses, or the tap is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from precompute.taps.attention import Attention, AttentionLayer, AttentionTaps
from precompute.taps.attention_layers import AttentionLayers
from storage.errors import UserError


def check_attention(
    model: nn.Module, images: Float[Tensor, "B 3 H W"], found: AttentionLayers, tolerance: float = 1e-4
) -> float:
    """Contract 12: rows recomputed from what is tapped, and these over the tapped values, are what the network uses.

    The network runs with its fused kernels, and once more without them where it can: rows are compared with its own
    softmax, and what they make of the values with what the layer goes on with. In the run without, each layer goes on
    with what came of the fused kernel, so that rounding does not add up over layers. On the meta device, where tensors
    have no values, nothing is compared.

    Args:
        model: in eval mode.
        images: normalized, on the model's device.
        found: the network's layers.
        tolerance: largest difference allowed, as a part of the largest value of the layer.

    Returns:
        The largest relative difference of rows over all layers.

    Raises:
        UserError: they differ.
    """
    used = _Used(found.layers)
    with torch.no_grad(), used:
        model(images)
    if images.is_meta:
        return 0.0
    unfused = _Used(found.layers, used.gathered)
    with torch.no_grad(), _without_fused_kernels(model), unfused:
        model(images)
    worst = 0.0
    for layer, attention in zip(found.layers, used.attention, strict=True):
        rows, where = attention.rows(), f"{type(model).__name__}: attention layer {layer.number}"
        for seen in (used, unfused):
            if layer.call in seen.rows:
                what = f"{where}: the attention recomputed from its kernel's arguments"
                worst = max(worst, _difference(what, rows, seen.rows[layer.call], tolerance))
            if layer.call not in seen.gathered:
                raise UserError(
                    f"{where}: what it makes of its attention cannot be seen, so its taps cannot be checked"
                )
            assert attention.v is not None
            what = f"{where}: the attention over its values"
            _difference(what, rows @ attention.v, seen.gathered[layer.call], tolerance)
    return worst


def _difference(what: str, ours: Tensor, theirs: Tensor, tolerance: float) -> float:
    """Largest difference as a part of the largest value. Raises UserError over the tolerance."""
    theirs = theirs.reshape(ours.shape)
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    if not error <= tolerance:
        raise UserError(
            f"{what} differs from what the network uses by {error:.2g} of the largest value (allowed: "
            f"{tolerance:g}), so its attention cannot be stored"
        )
    return error


class _Used(AttentionTaps):
    """What layers make, beside what of: rows, where no fused kernel hides them, and what these make of the values.

    Args:
        layers: which.
        instead: what they go on with, by call, in place of what they made.
    """

    def __init__(self, layers: tuple[AttentionLayer, ...], instead: Mapping[int, Tensor] | None = None) -> None:
        super().__init__(layers)
        self.instead = {} if instead is None else instead
        self.rows: dict[int, Tensor] = {}
        self.gathered: dict[int, Tensor] = {}

    def _keep(self, call: int, attention: Attention, rows: Tensor | None) -> None:
        super()._keep(call, attention, rows)
        if call in self._heads and rows is not None:
            self.rows[call] = rows

    def _meet_values(self, call: int, values: Tensor, output: Tensor) -> Tensor:
        super()._meet_values(call, values, output)
        if call in self._heads:
            self.gathered[call] = output
        return self.instead[call].reshape(output.shape) if call in self.instead else output


@contextmanager
def _without_fused_kernels(model: nn.Module) -> Iterator[None]:
    """Within this context timm's attention layers compute products and softmax."""
    switched = [module for module in model.modules() if getattr(module, "fused_attn", None) is True]
    for module in switched:
        module.fused_attn = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in switched:
            module.fused_attn = True  # type: ignore[assignment]
