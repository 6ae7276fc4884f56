"""Tensors that losses read of a student beside its logits: attention, values, residual streams and final tokens.

Each loss names those that it reads (`Loss.student_taps`). Only these are kept, and the network is not changed.
"""

from __future__ import annotations

import functools
from collections.abc import Set
from typing import Any, Literal, Self

from jaxtyping import Float
from torch import Tensor, nn

from precompute.taps import Attention, AttentionLayers, AttentionTaps, token_blocks
from storage.errors import UserError

StudentTap = Literal["labels", "logits", "attention", "values", "streams", "tokens"]

ELSEWHERE: frozenset[StudentTap] = frozenset({"labels", "logits"})  # of the batch, and what the network gives by itself


class StudentTaps:
    """Tensors of a student's last forward pass within this context, with gradients where there are any.

    Args:
        model: the student.
        taps: which are kept: `attention`, `values` (v), `streams` (the residual stream after each block), `tokens` (all
            tokens after the final norm). `labels` and `logits` are not read here.
        layers: the student's, where its attention or values are read (`StudentSpec.attention`).

    Raises:
        UserError: something cannot be read from this network.
    """

    def __init__(self, model: nn.Module, taps: Set[StudentTap], layers: AttentionLayers | None = None) -> None:
        self._model, self._attention = model, AttentionTaps(())
        self._streams: dict[int, Tensor] = {}
        self._tokens: dict[int, Tensor] = {}
        self._modules = attention_modules(model)
        self._switched: list[nn.Module] = []
        if taps & {"attention", "values"}:
            assert layers is not None
            self._attention = AttentionTaps(layers.layers)
        if "streams" in taps:
            blocks = token_blocks(model)
            if layers is not None and len(blocks) != len(layers.layers):
                raise UserError(
                    f"student {type(model).__name__}: of its {len(blocks)} blocks {len(layers.layers)} attend over all "
                    "tokens, so the tokens after its layers cannot be read"
                )
            for n, block in enumerate(blocks, 1):
                block.register_forward_hook(functools.partial(_keep, self._streams, n))
        if "tokens" in taps:
            token_blocks(model)  # raises where there are none
            if not isinstance(norm := getattr(model, "norm", None), nn.Module):
                raise UserError(f"student {type(model).__name__}: it has no final norm, so its tokens cannot be read")
            norm.register_forward_hook(functools.partial(_keep, self._tokens, 0))

    def __enter__(self) -> Self:
        if self._attention.layers:
            # Where the recipe wants no fused kernel, the taps compute without one: the network's own products would
            # hide q and k.
            self._switched = [module for module in self._modules if not module.fused_attn]
            self._attention.kernel = "unfused" if self._switched else "network"
            _set_fused(self._switched, True)
            self._attention.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._attention.layers:
            self._attention.__exit__(*error)  # type: ignore[no-untyped-call]
            _set_fused(self._switched, False)

    @property
    def attention(self) -> list[Attention]:
        """What each layer's attention was computed from."""
        return self._attention.attention

    @property
    def v(self) -> list[Float[Tensor, "B _H _N _d"]]:
        """Values, a tensor a layer."""
        return self._vectors("v")

    @property
    def q(self) -> list[Float[Tensor, "B _H _N _d"]]:
        """Queries as the kernel got them, a tensor a layer."""
        return self._vectors("q")

    @property
    def k(self) -> list[Float[Tensor, "B _H _N _d"]]:
        """Keys as the kernel got them, a tensor a layer."""
        return self._vectors("k")

    def _vectors(self, name: str) -> list[Tensor]:
        vectors = [getattr(layer, name) for layer in self.attention]
        if any(tensor is None for tensor in vectors):
            kind = type(self._model).__name__
            raise UserError(f"student {kind}: it calls no attention kernel in some layer, so its {name} is not known")
        return vectors

    @property
    def streams(self) -> list[Float[Tensor, "B N D"]]:
        """The residual stream after each block."""
        return [self._streams[n] for n in sorted(self._streams)]

    @property
    def tokens(self) -> Float[Tensor, "B N D"]:
        """All tokens after the final norm."""
        return self._tokens[0]

    def clear(self) -> None:
        """Drop the tensors of the last forward pass, so that a compiled network is not compiled again for them."""
        self._attention.clear()
        self._streams.clear()
        self._tokens.clear()


def _keep(kept: dict[int, Tensor], number: int, _module: nn.Module, _args: Any, output: Tensor) -> None:
    kept[number] = output


def _set_fused(modules: list[nn.Module], fused: bool) -> None:
    for module in modules:
        module.fused_attn = fused  # type: ignore[assignment]


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """Layers of a student with a fused and an unfused attention kernel, without those that copied maps keep unfused."""
    return [
        module
        for module in model.modules()
        if isinstance(getattr(module, "fused_attn", None), bool) and not getattr(module, "copies_maps", False)
    ]
