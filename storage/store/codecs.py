"""Codecs: how a target is kept. NumPy encodes where the teacher runs; decoding works on NumPy and on torch alike."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from storage.errors import UserError, did_you_mean
from storage.objects.record_schema import Schema
from storage.store.native_maps import NativeMaps
from storage.store.quantize import HalfOverflow, dequantize, grouped, groups, packed, quantize, unpacked

CODECS = ("f32", "f16", "u8", "log8", "topk", "u4")  # the exact ones first
_BITS = {"u8": 8, "u4": 4}  # of affine codes
TOP = 20  # classes that `topk` keeps where no number is said

# What a tensor's values are: anything, rows of probabilities (attention), or logits of classes.
Values = Literal["plain", "rows", "logits"]
_ONLY: dict[str, tuple[Values, str]] = {
    "log8": ("rows", "keeps rows of probabilities: class_row, attention"),
    "topk": ("logits", "keeps the largest of class scores: logits"),
}
_SLICE = 8  # samples whose error is measured at a time: in f64, they take many times their bytes
_LOG_STEPS, _LOG_ZERO = 16, 255  # of log8: codes for a factor of two, and the code of zero


def check_codec(codec: str, values: Values | None = None) -> str:
    """The codec's full name (`topk` is `topk20`).

    Raises:
        UserError: there is no such codec, with the nearest one, or it does not keep such values.
    """
    match = re.fullmatch(r"topk([1-9]\d{0,4})?", codec)
    kind = "topk" if match else codec
    if kind not in CODECS:
        raise UserError(f"no codec is called {codec!r}", hint=did_you_mean(codec, CODECS))
    if values is not None and kind in _ONLY and _ONLY[kind][0] != values:
        raise UserError(f"codec {codec} {_ONLY[kind][1]}", hint="Use f32, f16, u8 or u4.")
    return f"topk{match[1] or TOP}" if match else codec


def codecs_for(values: Values) -> list[str]:
    """The codecs that keep such values."""
    return [check_codec(codec) for codec in CODECS if codec not in _ONLY or _ONLY[codec][0] == values]


Error = Annotated[float, Field(ge=0)]


class CodecError(Schema):
    """What keeping values costs.

    Attributes:
        relative: ‖x − x′‖ ÷ ‖x‖.
        cosine: the mean over maps, before and after.
        kl: of distributions, the mean of Σ p·log(p/p′) over rows (of their softmax for logits), p′ made to sum to 1, in
            nats.
        loss_error: |L′ − L| ÷ L of a squared loss whose student gives the mean of the images, as an untrained one may.
        gradient_cosine: of that loss's gradients, before and after.
    """

    relative: Error
    cosine: float
    kl: float = 0
    loss_error: Error | None = None
    gradient_cosine: float | None = None


class ArraySpec(NamedTuple):
    """One of the arrays that a codec makes: type and shape of one sample, and what its axes are."""

    dtype: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Codec:
    """How one target is kept.

    Attributes:
        name: `f32`, `f16`, `u8`, `u4`, `log8` or `topkN`; `raw` for what is uint8 already, view images.
        shape: of one sample's decoded values.
        maps: how many of the last axes make one map, the unit that `u8` scales: 2 for activations `[C, g, g]`, 1 for
            class rows `[L, H, N]` and vectors, which `u4` scales in groups of 32 numbers.
        axes: names of the axes.
        values: what they are.
        native: of activations whose maps are kept on their own sides: which.
    """

    name: str
    shape: tuple[int, ...]
    maps: int
    _: KW_ONLY
    axes: tuple[str, ...] = field(default=(), compare=False)
    values: Values = "plain"
    native: NativeMaps | None = None

    @property
    def top(self) -> int:
        """How many classes `topk` keeps."""
        return min(int(self.name.removeprefix("topk")), self.shape[-1])

    @property
    def sample_bytes(self) -> int:
        """Bytes that one sample takes at rest."""
        return sum(np.dtype(part.dtype).itemsize * math.prod(part.shape) for part in self.layout().values())

    @property
    def parts(self) -> dict[str, tuple[int, ...]]:
        """Array -> shape of one sample's values in it: `data`, or of native maps an array for each side."""
        if self.native is None:
            return {"data": self.shape}
        return {f"data_{side}": (count, side, side) for side, count in self.native.channels.items()}

    @property
    def _in_groups(self) -> bool:
        return self.name == "u4" and self.maps == 1

    def layout(self, *, wide: bool = False) -> dict[str, ArraySpec]:
        """name -> what each array keeps of one sample."""
        shape, parts = self.shape, self.parts
        if self.name == "raw":
            return {"data": ArraySpec("uint8", shape, self.axes)}
        axes = self.axes or tuple(f"axis{i}" for i in range(len(shape)))
        if self.name in _BITS:
            units = shape[: len(shape) - self.maps]
            arrays = {name: ArraySpec("uint8", part, axes) for name, part in parts.items()}
            if self.name == "u4":
                half = {name: -(-math.prod(part) // 2) for name, part in parts.items()}
                arrays = {name: ArraySpec("uint8", (count,), ("byte",)) for name, count in half.items()}
            names = axes[: len(units)]
            if self._in_groups:
                units, names = (*units, groups(shape[-1])), (*names, "group")
            scale = ArraySpec("float32" if wide else "float16", (*units, 2), (*names, "scale_offset"))
            return {**arrays, "scale": scale}
        if self.name == "log8":
            return {"data": ArraySpec("uint8", shape, axes), "largest": ArraySpec("float16", shape[:-1], axes[:-1])}
        if self.name.startswith("topk"):
            index = "uint16" if shape[-1] <= 1 << 16 else "uint32"
            top, ranks = (*shape[:-1], self.top), (*axes[:-1], "rank")
            rest = ArraySpec("float32", (*shape[:-1], 1), (*axes[:-1], "mass"))
            return {"data": ArraySpec("float16", top, ranks), "index": ArraySpec(index, top, ranks), "rest": rest}
        kind = "float32" if self.name == "f32" else "float16"
        return {name: ArraySpec(kind, part, axes) for name, part in parts.items()}

    def split(self, values: Any) -> dict[str, Any]:
        """Array -> its values `[n, …]`, of what a teacher's graph gives: `[n, *shape]`, of native maps `[n, V]`."""
        if self.native is None:
            return {"data": values}
        return {f"data_{side}": maps for side, maps in self.native.split(values).items()}

    def join(self, parts: Mapping[str, Any]) -> Any:
        """The values f32 `[n, *shape]` of those of each array: native maps are resized to their grid."""
        if self.native is None:
            return parts["data"]
        return self.native.join({side: parts[f"data_{side}"] for side in self.native.channels})

    def exact(self, values: Any) -> Any:
        """The values f32 `[n, *shape]` of what a teacher's graph gives, as no codec had kept them."""
        return self.join(self.split(values))

    def encode(self, values: np.ndarray, *, wide: bool = False) -> dict[str, np.ndarray]:
        """The arrays that keep `values` f32, `[n, *shape]` or as `split` takes them.

        `u8`, `u4`: affine codes of 8 and 4 bits (`storage.store.quantize.quantize`), of each map, or of each group of
        32 numbers of a vector in `u4`, two codes a byte. Error at most scale/2.
        `log8`: per row, code = clip(round(16·log2(max/p)), 0, 255) with 255 for zero, against the row's largest value
        as it is kept in f16. Error at most 2.2 % of each p; what is under max/2^15.9 becomes zero.
        `topk`: the k largest logits in f16 with their classes, largest first, and the softmax mass of all others.

        Raises:
            HalfOverflow: affine codes without `wide`, where f16 cannot hold a scale or an offset.
            UserError: f16 cannot hold a value, or `log8` is given a negative one.
        """
        if self.name == "raw":
            return {"data": values}
        if self.name in _BITS:
            return self._encode_affine(values, wide)
        if self.name == "log8":
            return _encode_log8(values)
        if self.name.startswith("topk"):
            return _encode_topk(values, self.top, self.layout()["index"].dtype)
        if self.name == "f32":
            return {name: np.ascontiguousarray(part, np.float32) for name, part in self.split(values).items()}
        return {name: _half(part, self.name) for name, part in self.split(values).items()}

    def _encode_affine(self, values: np.ndarray, wide: bool) -> dict[str, np.ndarray]:
        arrays, scales = {}, []
        for name, part in self.split(values).items():
            if self._in_groups:
                codes, scale = quantize(grouped(part), 1, _BITS[self.name], wide)
                codes = codes.reshape(*part.shape[:-1], -1)[..., : part.shape[-1]]
            else:
                codes, scale = quantize(part, self.maps, _BITS[self.name], wide)
            arrays[name] = packed(codes) if self.name == "u4" else codes
            scales.append(scale)
        return {**arrays, "scale": scales[0] if len(scales) == 1 else np.concatenate(scales, 1)}

    def values_of(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """The f32 values that each array keeps; `join` makes them one."""
        if self.name == "log8":
            return {"data": _decode_log8(arrays)}
        if self.name.startswith("topk"):
            return {"data": _decode_topk(arrays, self.shape[-1])}
        if self.name not in _BITS:
            return {name: _float(arrays[name]) for name in self.parts}
        scales, start, values = _float(arrays["scale"]), 0, {}
        for name, shape in self.parts.items():
            codes = unpacked(arrays[name], shape) if self.name == "u4" else _float(arrays[name])
            if self._in_groups:
                in_groups = dequantize(grouped(codes), scales)
                values[name] = in_groups.reshape(*codes.shape[:-1], -1)[..., : shape[-1]]
                continue
            scale = scales if self.native is None else scales[:, start : start + shape[0]]
            values[name], start = dequantize(codes, scale), start + shape[0]
        return values

    def steps(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The scale of each value that affine codes keep, in the shapes of `values_of`."""
        ones = 0x11 if self.name == "u4" else 1
        at = {code: {**arrays, **{name: np.full_like(arrays[name], code) for name in self.parts}} for code in (0, ones)}
        low, high = self.values_of(at[0]), self.values_of(at[ones])
        return {name: high[name] - low[name] for name in self.parts}

    def decode(self, arrays: Mapping[str, Any]) -> Any:
        """The f32 values `[n, *shape]` that arrays keep: NumPy arrays give NumPy, torch tensors torch on their device.

        `u8`, `u4`: x = code · scale + offset. `log8`: p = max · 2^(−code/16). `topk`: the logits as kept, and for every
        other class the one value that gives them their mass. Native maps are then resized to the grid.
        """
        return self.join(self.values_of(arrays))

    def error(self, values: np.ndarray) -> CodecError:
        """What keeping `values` f32, as `encode` takes them, of some images costs."""
        pieces = [values[start : start + _SLICE] for start in range(0, len(values), _SLICE)]
        mean = np.sum([self.exact(piece).sum(0, dtype=np.float64) for piece in pieces], 0) / len(values)
        mean = mean.reshape(*mean.shape[: mean.ndim - self.maps], -1)
        totals = np.zeros(9)
        for piece in pieces:
            try:
                arrays = self.encode(piece)
            except HalfOverflow:
                arrays = self.encode(piece, wide=True)
            before = self.exact(piece).astype(np.float64).reshape(len(piece), *mean.shape)
            after = self.decode(arrays).astype(np.float64).reshape(before.shape)
            norms = np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1)
            cosines = (before * after).sum(-1)[norms > 0] / norms[norms > 0]
            kl = np.zeros(0) if self.values == "plain" else _kl(before, after, self.values)
            squares, differences = (before**2).sum(), ((before - after) ** 2).sum()
            exact, kept = before - mean, after - mean  # gradients of ‖mean − x‖²/2 but for their sign
            losses = [(exact**2).sum(), (kept**2).sum(), (exact * kept).sum()]
            totals += [cosines.sum(), cosines.size, squares, differences, kl.sum(), kl.size, *losses]
        cosine, maps, square, difference, divergence, rows, loss, kept_loss, product = totals.tolist()
        error = CodecError(
            relative=math.sqrt(difference / max(square, 1e-300)),
            cosine=cosine / maps if maps else 1.0,
            loss_error=abs(kept_loss - loss) / loss if loss else None,  # all images alike: there is nothing to learn
            gradient_cosine=product / math.sqrt(loss * kept_loss) if loss * kept_loss else None,
        )
        return error if self.values == "plain" else error.model_copy(update={"kl": divergence / max(rows, 1)})


def _kl(before: np.ndarray, after: np.ndarray, values: Values) -> np.ndarray:
    """Σ p·log(p/p′) of each row, f64."""
    if values == "logits":
        logs = [x - x.max(-1, keepdims=True) for x in (before, after)]
        logs = [x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logs]
    else:
        rows = [np.maximum(x, 1e-12) for x in (before, after)]  # what a codec made zero costs something finite
        logs = [np.log(x / x.sum(-1, keepdims=True)) for x in rows]
    divergence: np.ndarray = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1)
    return divergence


def _half(values: np.ndarray, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        data = values.astype(np.float16)
    if not np.isfinite(data).all():
        message = f"codec {name} cannot hold values up to {np.abs(values).max():g}"
        raise UserError(message, hint="Use codec=f32 or codec=u8.")
    return data


def _encode_log8(values: np.ndarray) -> dict[str, np.ndarray]:
    if values.min(initial=0) < 0:
        raise UserError(f"codec log8 keeps probabilities, found {values.min():g}", hint="Use codec=f16.")
    largest = _half(values.max(-1), "log8")
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        codes = np.rint(_LOG_STEPS * np.log2(largest.astype(np.float32)[..., None] / values))
    codes = np.where(values > 0, codes, _LOG_ZERO)  # 0/0 where a whole row is zero
    return {"data": np.clip(codes, 0, _LOG_ZERO).astype(np.uint8), "largest": largest}


def _decode_log8(arrays: Mapping[str, Any]) -> Any:
    codes, largest = arrays["data"], _float(arrays["largest"])
    powers = _float(codes)
    powers *= -1 / _LOG_STEPS
    powers = np.exp2(powers) if isinstance(powers, np.ndarray) else powers.exp2_()
    powers *= largest[..., None]
    powers[codes == _LOG_ZERO] = 0
    return powers


def _encode_topk(values: np.ndarray, top: int, index_type: str) -> dict[str, np.ndarray]:
    order = np.argsort(-values, axis=-1, kind="stable")
    chosen = order[..., :top]
    exact = np.exp(values.astype(np.float64) - values.max(-1, keepdims=True))
    rest = np.take_along_axis(exact, order[..., top:], -1).sum(-1, keepdims=True) / exact.sum(-1, keepdims=True)
    data = _half(np.take_along_axis(values, chosen, -1), "topk")
    return {"data": data, "index": chosen.astype(index_type), "rest": rest.astype(np.float32)}


def _decode_topk(arrays: Mapping[str, Any], classes: int) -> Any:
    data, rest, index = _float(arrays["data"]), _float(arrays["rest"]), arrays["index"]
    others = max(classes - data.shape[-1], 1)
    rest = rest.clip(1e-30, 1 - 1e-6)  # a mass of nothing, or of everything, has no logit
    ratio, largest = rest / (1 - rest) / others, data[..., :1]  # the largest comes first
    if isinstance(data, np.ndarray):
        level = largest + np.log(np.exp(data - largest).sum(-1, keepdims=True) * ratio)
        logits = np.repeat(level, classes, -1)
        np.put_along_axis(logits, index.astype(np.int64), data, -1)
        return logits
    level = largest + ((data - largest).exp().sum(-1, keepdim=True) * ratio).log()
    return level.expand(*level.shape[:-1], classes).clone().scatter_(-1, index.long(), data)


def _float(array: Any) -> Any:
    return array.astype(np.float32) if isinstance(array, np.ndarray) else array.float()
