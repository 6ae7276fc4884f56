"""Attention where a network computes it: what its kernel is called with, seen by a torch function mode.

Nothing here knows an architecture. A layer's attention is a call of `scaled_dot_product_attention`, whose queries and
keys are those after norms and rotation and whose mask holds relative positions; or, where a layer has no fused kernel,
a softmax whose output is multiplied with values. Teacher and student are read by this one piece of code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from storage.errors import UserError

_SOFTMAX = {torch.softmax, torch.Tensor.softmax, F.softmax}
_PRODUCT = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm}

Kernel = Literal["network", "unfused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionLayer:
    """A layer whose attention can be read.

    Attributes:
        number: from 1, counting the layers that can be read.
        call: its place, from 0, among all attention calls of a forward pass.
        heads: H.
        queries: Q: N, or 1 where only the class token attends.
        tokens: N, the keys.
        scale: what scores are multiplied by, usually 1/√d; 1 for a layer without a kernel.
        fused: whether it calls the kernel, so that its q and k are known; else scores and values alone.
        biased: whether something is added to the scores, such as relative positions.
    """

    number: int
    call: int
    heads: int
    queries: int
    tokens: int
    scale: float
    fused: bool = True
    biased: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """What one layer's attention was computed from in a forward pass, with gradients where there are any.

    Attributes:
        q: queries `[B, H, Q, d]` as the kernel got them; None for a layer without a fused kernel.
        k: keys `[B, H, N, d]`, likewise.
        v: values `[B, H, N, d]`.
        scale: what q·kᵀ is multiplied by.
        bias: what is then added, broadcast to `[B, H, Q, N]`; None for nothing.
        raw_scores: `[B, H, Q, N]` of a layer without a fused kernel: what its softmax is taken of.
    """

    q: Float[Tensor, "B H Q d"] | None = None
    k: Float[Tensor, "B H N d"] | None = None
    v: Float[Tensor, "B H N d"] | None = None
    scale: float = 1.0
    bias: Tensor | None = None
    raw_scores: Float[Tensor, "B H Q N"] | None = None

    def scores(self, queries: slice = slice(None), *, scale: float | None = None) -> Float[Tensor, "B H _Q N"]:
        """What these queries' attention is the softmax of: q·kᵀ·scale + bias, in f32 or more.

        Args:
            queries: which; all by default. Only these are computed.
            scale: in place of the layer's own.

        Raises:
            UserError: another scale, of a layer without a fused kernel.
        """
        if self.raw_scores is not None:
            if scale is not None:
                raise UserError("a layer without a fused attention kernel: what its q·kᵀ is multiplied by is not known")
            return full(self.raw_scores[:, :, queries])
        assert self.q is not None
        assert self.k is not None
        q, k = full(self.q[:, :, queries]), full(self.k)
        scores = q * (self.scale if scale is None else scale) @ k.transpose(-2, -1)
        if self.bias is None:
            return scores
        return scores + full(self.bias.expand(*self.bias.shape[:-2], self.q.shape[2], k.shape[2])[..., queries, :])

    def rows(self, queries: slice = slice(None)) -> Float[Tensor, "B H _Q N"]:
        """These queries' attention over all tokens; each row sums to one."""
        return self.scores(queries).softmax(-1)

    def of_heads(self, heads: slice | Sequence[int]) -> Self:
        """This attention of some heads alone."""
        by_head = {name: t for name, t in tensors_of(self).items() if t.ndim == 4 and t.shape[1] > 1}
        return replace(self, **{name: tensor[:, heads] for name, tensor in by_head.items()})

    def with_heads(self, heads: int) -> Self:
        """Split an axis that batch and heads share, as in SAM's ViT: `[1, B·H, N, d]` becomes `[B, H, N, d]`."""
        joined = {name: t for name, t in tensors_of(self).items() if t.ndim == 4 and t.shape[1] > heads}
        return replace(self, **{name: t.reshape(-1, heads, *t.shape[-2:]) for name, t in joined.items()})


def tensors_of(attention: Attention) -> dict[str, Any]:
    """The tensors that an attention call has, by name."""
    named = {name: getattr(attention, name) for name in ("q", "k", "v", "bias", "raw_scores")}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def full(values: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """Values in f32 or more: a network gives less under autocast, and attention is computed in f32."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


class AttentionTaps(TorchFunctionMode):
    """Reads the attention of chosen layers while a network runs within this context: `with taps: model(images)`.

    The fused kernel is left in place. Each pass replaces what the one before left.

    Args:
        layers: as `attention_layers` gives them.
        kernel: `network` for the network's own; `unfused` for a product, softmax and product in place of the fused
            kernel, which is the faster way in bfloat16 on a CPU.
    """

    def __init__(self, layers: Sequence[AttentionLayer], *, kernel: Kernel = "network") -> None:
        super().__init__()
        self.layers, self.kernel = tuple(layers), kernel
        self._heads = {layer.call: layer.heads for layer in layers}
        self._next = 0
        self._kept: dict[int, Attention] = {}
        self._softmax: tuple[int, Tensor] | None = None  # call and output of the last one, until values meet it

    def __enter__(self) -> Self:
        self._next = 0
        self._softmax = None
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    @property
    def attention(self) -> list[Attention]:
        """What each of the layers computed in the last pass."""
        return [self._kept[layer.call] for layer in self.layers]

    def clear(self) -> None:
        """Let go of what the last pass left; a compiled network is then not compiled again for it."""
        self._kept.clear()
        self._softmax = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is F.multi_head_attention_forward and _is_plain(*args, **kwargs):
            return self._attend_packed(*args, **kwargs)
        output = func(*args, **kwargs)
        if func in _SOFTMAX:
            call, self._next = self._next, self._next + 1
            self._softmax = call, output
            self._keep(call, Attention(raw_scores=args[0]), output)
        elif self._softmax is not None and args and args[0] is self._softmax[1]:
            if func is F.dropout:
                self._softmax = self._softmax[0], output
            elif func in _PRODUCT:
                call, self._softmax = self._softmax[0], None
                return self._meet_values(call, args[1], output)
        return output

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **more: Any,
    ) -> Tensor:
        call, self._next = self._next, self._next + 1
        q, k, v = (_four(tensor) for tensor in (query, key, value))
        bias = _bias(attn_mask, is_causal, query, key)
        scale = more.get("scale")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        self._keep(call, Attention(q=q, k=k, v=v, scale=scale, bias=bias), None)
        if self.kernel == "unfused" and not more.get("enable_gqa"):
            scores = q * scale @ k.transpose(-2, -1)
            rows = (scores if bias is None else scores + bias).softmax(-1)
            output = (F.dropout(rows, dropout_p) if dropout_p else rows) @ v
        elif query.ndim == 4:
            output = F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **more)
        else:  # the exporter to ONNX knows four axes alone
            output = F.scaled_dot_product_attention(q, k, v, bias, dropout_p, **more)
        output = self._meet_values(call, v, output)
        return output if query.ndim == 4 else output.reshape(*query.shape[:-1], value.shape[-1])

    def _attend_packed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        _width: int,
        heads: int,
        in_weight: Tensor,
        in_bias: Tensor | None,
        _bias_k: None,
        _bias_v: None,
        _zero: bool,
        dropout_p: float,
        out_weight: Tensor,
        out_bias: Tensor | None,
        *,
        training: bool = True,
        need_weights: bool = True,
        average_attn_weights: bool = True,
        **_nothing: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """What `nn.MultiheadAttention` computes, of tokens `[N, B, D]`, by the kernel that is read."""
        weights = in_weight.chunk(3)
        biases = [None] * 3 if in_bias is None else in_bias.chunk(3)
        q, k, v = (
            F.linear(tokens, weight, bias).reshape(*tokens.shape[:2], heads, -1).permute(1, 2, 0, 3)
            for tokens, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        output = self._attend(q, k, v, dropout_p=dropout_p if training else 0.0)
        output = F.linear(output.permute(2, 0, 1, 3).flatten(2), out_weight, out_bias)
        if not need_weights:
            return output, None
        rows = Attention(q=q, k=k, scale=q.shape[-1] ** -0.5).rows()
        return output, rows.mean(1) if average_attn_weights else rows

    def _keep(self, call: int, attention: Attention, _rows: Tensor | None) -> None:
        """Called for each attention call, with its rows where the kernel is not fused; keeps those of chosen layers."""
        if (heads := self._heads.get(call)) is not None:
            self._kept[call] = attention.with_heads(heads)

    def _meet_values(self, call: int, values: Tensor, output: Tensor) -> Tensor:
        """Called when a call's rows have met its values, with what came of it; gives what the network goes on with."""
        if call in self._kept:
            self._kept[call] = replace(self._kept[call], v=values).with_heads(self._heads[call])
        return output


def _is_plain(*args: Any, **kwargs: Any) -> bool:
    """Whether `nn.MultiheadAttention` attends without masks, extra tokens and weights of unlike widths."""
    masks = [kwargs.get(name) for name in ("key_padding_mask", "attn_mask", "static_k", "static_v")]
    split = kwargs.get("use_separate_proj_weight") or kwargs.get("is_causal")
    return args[0].ndim == 3 and not split and not args[9] and all(part is None for part in (*args[7:9], *masks))


def _four(tensor: Tensor) -> Tensor:
    """The tensor with four axes: leading ones joined, or new."""
    return tensor if tensor.ndim == 4 else tensor[None] if tensor.ndim == 3 else tensor.flatten(1, -3)


def _bias(mask: Tensor | None, causal: bool, query: Tensor, key: Tensor) -> Tensor | None:
    """What a kernel adds to its scores, with the axes of `_four`."""
    if causal:
        mask = query.new_ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
    if mask is None:
        return None
    if mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
    if query.ndim == 4 or mask.ndim < 3:
        return mask
    return _four(mask.expand(*query.shape[:-2], *mask.shape[-2:]))
