"""Tensors that losses read of a student beside its logits: queries, keys, values, residual streams and final tokens.

Each loss names those that it reads (`Loss.student_taps`). Only these are kept, by hooks that do not change the network.
"""

from __future__ import annotations

import functools
from collections.abc import Set
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn

from precompute.taps import AttentionTaps, token_blocks
from storage.errors import UserError

StudentTap = Literal["labels", "logits", "attention", "values", "streams", "tokens"]

ELSEWHERE: frozenset[StudentTap] = frozenset({"labels", "logits"})  # of the batch, and what the network gives by itself


class StudentTaps:
    """Tensors of a student's last forward pass, with gradients where there are any.

    Args:
        model: the student.
        taps: which are kept: `attention` (q and k), `values` (v), `streams` (the residual stream after each block),
            `tokens` (all tokens after the final norm). `labels` and `logits` are not read here.

    Raises:
        UserError: something cannot be read from this network.
    """

    def __init__(self, model: nn.Module, taps: Set[StudentTap]) -> None:
        self._attention: AttentionTaps | None = None
        self._streams: dict[int, Tensor] = {}
        self._tokens: dict[int, Tensor] = {}
        if taps & {"attention", "values"}:
            self._attention = AttentionTaps(model, values="values" in taps)
        if taps & {"streams", "tokens"}:
            token_blocks(model)  # raises where there are none
        if "streams" in taps:
            for n, block in enumerate(model.blocks, 1):  # type: ignore[arg-type]
                block.register_forward_hook(functools.partial(_keep, self._streams, n))
        if "tokens" in taps:
            if not isinstance(norm := getattr(model, "norm", None), nn.Module):
                raise UserError(f"student {type(model).__name__}: it has no final norm, so its tokens cannot be read")
            norm.register_forward_hook(functools.partial(_keep, self._tokens, 0))

    @property
    def q(self) -> list[Float[Tensor, "B _H _N _d"]]:
        """Queries, a tensor a layer."""
        return self._taps.q

    @property
    def k(self) -> list[Float[Tensor, "B _H _N _d"]]:
        """Keys, a tensor a layer."""
        return self._taps.k

    @property
    def v(self) -> list[Float[Tensor, "B _H _N _d"]]:
        """Values, a tensor a layer."""
        return self._taps.v

    @property
    def scales(self) -> list[float]:
        """1/√d of each layer."""
        return self._taps.scales

    @property
    def streams(self) -> list[Float[Tensor, "B N D"]]:
        """The residual stream after each block."""
        return [self._streams[n] for n in sorted(self._streams)]

    @property
    def tokens(self) -> Float[Tensor, "B N D"]:
        """All tokens after the final norm."""
        return self._tokens[0]

    @property
    def _taps(self) -> AttentionTaps:
        assert self._attention is not None, "attention is read by a loss that does not say so"
        return self._attention

    def clear(self) -> None:
        """Drop the tensors of the last forward pass, so that a compiled network is not compiled again for them."""
        if self._attention is not None:
            self._attention.clear()
        self._streams.clear()
        self._tokens.clear()


def _keep(kept: dict[int, Tensor], number: int, _module: nn.Module, _args: Any, output: Tensor) -> None:
    kept[number] = output


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """Layers of a student with a fused and an unfused attention kernel, without those that copied maps keep unfused."""
    return [
        module
        for module in model.modules()
        if isinstance(getattr(module, "fused_attn", None), bool) and not getattr(module, "copies_maps", False)
    ]
