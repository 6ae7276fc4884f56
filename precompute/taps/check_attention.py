"""Contract 12: what is tapped of attention is what the network uses, or the tap is refused."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from precompute.taps.attention import AttentionTaps, attention_layers, attention_rows
from storage.errors import UserError


@contextmanager
def _with_fused(layers: Sequence[nn.Module], fused: bool) -> Iterator[None]:
    before = [getattr(layer, "fused_attn", None) for layer in layers]
    for layer in layers:
        layer.fused_attn = fused  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer.fused_attn = was  # type: ignore[assignment]


def check_attention(
    model: nn.Module, images: Float[Tensor, "B 3 H W"], tolerance: float = 1e-4, *, values: bool = False
) -> float:
    """Contract 12: softmax(q·kᵀ·scale) of the tapped q and k is the attention that the network uses.

    On the meta device, where tensors have no values, only what the fused kernel is given is looked at.

    Args:
        model: in eval mode.
        images: normalized, on the model's device.
        tolerance: largest difference allowed, as a part of the largest attention of the layer.
        values: check too that this attention over the tapped v is what the layer goes on with.

    Returns:
        The largest relative difference found over all layers.

    Raises:
        UserError: they differ: rotary embeddings, relative positions or other biases act after the tap.
    """
    layers = attention_layers(model, pooled=True)
    taps = AttentionTaps(model, values=values)
    try:
        worst = 0.0  # of tensors without values
        if not images.is_meta:
            worst = _largest_difference(model, images, layers, taps, tolerance=tolerance, values=values)
        _require_tapped_kernel(model, images, layers, taps)
        return worst
    finally:
        taps.remove()


_AFTER = "rotary embeddings, relative positions or other biases act after the tap, so its attention cannot be stored"


def _kind(model: nn.Module, number: int, layer: nn.Module) -> str:
    return f"{type(model).__name__}: layer {number} ({type(layer).__module__}.{type(layer).__name__})"


class _Kernels(TorchFunctionMode):
    """Keeps what the fused kernel is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.calls.append((args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def plain(self, q: Tensor, k: Tensor) -> bool:
        """Whether some call had these very tensors, and neither a mask nor a scale of its own."""
        for args, more in self.calls:
            masked = more.get("attn_mask") is not None or more.get("is_causal") or more.get("scale") is not None
            if len(args) == 3 and args[0] is q and args[1] is k and not masked:
                return True
        return False


def _require_tapped_kernel(model: nn.Module, images: Tensor, layers: Sequence[nn.Module], taps: AttentionTaps) -> None:
    """Where a layer has a fused kernel, it is given the tapped q and k themselves, and nothing that changes them.

    Raises:
        UserError: naming the layer.
    """
    fused = [isinstance(getattr(layer, "fused_attn", None), bool) for layer in layers]
    with torch.no_grad(), _with_fused(layers, True), _Kernels() as kernels:
        model(images)
    for n, (layer, q, k) in enumerate(zip(layers, taps.q, taps.k, strict=True), 1):
        if fused[n - 1] and not kernels.plain(q, k):
            raise UserError(
                f"{_kind(model, n, layer)}: its kernel is given other tensors than the tapped q and k: {_AFTER}"
            )


def _largest_difference(
    model: nn.Module,
    images: Tensor,
    layers: Sequence[nn.Module],
    taps: AttentionTaps,
    *,
    tolerance: float,
    values: bool,
) -> float:
    """Largest difference between attention recomputed from q and k and the unfused kernel's; as `check_attention`."""
    used: dict[int, Tensor] = {}
    gathered: dict[int, Tensor] = {}
    handles = []
    for n, layer in enumerate(layers, 1):
        handles.append(layer.attn_drop.register_forward_pre_hook(functools.partial(_keep_input, used, n)))  # type: ignore[union-attr]
        after = layer.norm if isinstance(getattr(layer, "norm", None), nn.Module) else layer.proj
        handles.append(after.register_forward_pre_hook(functools.partial(_keep_input, gathered, n)))  # type: ignore[union-attr]
    worst = 0.0
    try:
        with torch.no_grad(), _with_fused(layers, False):
            model(images)
        for n, (layer, q, k) in enumerate(zip(layers, taps.q, taps.k, strict=True), 1):
            kind = _kind(model, n, layer)
            if n not in used:
                raise UserError(f"{kind}: the attention that it uses cannot be seen, so its taps cannot be checked")
            rows = attention_rows(q, k, taps.scales[n - 1])
            if rows.shape != used[n].shape:
                raise UserError(f"{kind}: attention {tuple(used[n].shape)}, from q and k {tuple(rows.shape)}")
            error = float((rows - used[n]).abs().max() / used[n].abs().max())
            worst = max(worst, error)
            if not error <= tolerance:
                raise UserError(
                    f"{kind}: the attention recomputed from q and k differs from the one that the network uses by "
                    f"{error:.2g} of its largest value (allowed: {tolerance:g}); {_AFTER}"
                )
            if values:
                whole = (used[n] @ taps.v[n - 1]).transpose(1, 2).flatten(2)
                if n not in gathered or gathered[n].shape != whole.shape:
                    raise UserError(f"{kind}: what it makes of its values cannot be seen, so they cannot be checked")
                error = float((whole - gathered[n]).abs().max() / gathered[n].abs().max())
                if not error <= tolerance:
                    raise UserError(
                        f"{kind}: its attention over the tapped values differs from what it goes on with by "
                        f"{error:.2g} of the largest value (allowed: {tolerance:g}), so its values cannot be stored"
                    )
    finally:
        for handle in handles:
            handle.remove()
    return worst


def _keep_input(kept: dict[int, Tensor], number: int, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
    kept[number] = args[0]
