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

CODECS = ("f32", "f16", "u8", "log8", "topk")
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
        raise UserError(f"codec {codec} {_ONLY[kind][1]}", hint="Use f32, f16 or u8.")
    return f"topk{match[1] or TOP}" if match else codec


def codecs_for(values: Values) -> list[str]:
    """The codecs that keep such values."""
    return [check_codec(codec) for codec in CODECS if codec not in _ONLY or _ONLY[codec][0] == values]


class HalfOverflow(UserError):
    """f16 cannot hold a map's scale or offset: all of the array's are kept in f32 (`wide`)."""


Error = Annotated[float, Field(ge=0)]


class CodecError(Schema):
    """What keeping values costs.

    Attributes:
        relative: ‖x − x′‖ ÷ ‖x‖.
        cosine: the mean over maps, before and after.
        kl: of distributions, the mean of Σ p·log(p/p′) over rows (of their softmax for logits), p′ made to sum to 1, in
            nats.
    """

    relative: Error
    cosine: float
    kl: float = 0


class ArraySpec(NamedTuple):
    """One of the arrays that a codec makes: type and shape of one sample, and what its axes are."""

    dtype: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Codec:
    """How one target is kept.

    Attributes:
        name: `f32`, `f16`, `u8`, `log8` or `topkN`; `raw` for what is uint8 already, view images.
        shape: of one sample's values.
        maps: how many of the last axes make one map, the unit that `u8` scales: 2 for activations `[C, g, g]`, 1 for
            class rows `[L, H, N]`.
        axes: names of the axes.
        values: what they are.
    """

    name: str
    shape: tuple[int, ...]
    maps: int
    _: KW_ONLY
    axes: tuple[str, ...] = field(default=(), compare=False)
    values: Values = "plain"

    @property
    def top(self) -> int:
        """How many classes `topk` keeps."""
        return min(int(self.name.removeprefix("topk")), self.shape[-1])

    @property
    def sample_bytes(self) -> int:
        """Bytes that one sample takes at rest."""
        return sum(np.dtype(part.dtype).itemsize * math.prod(part.shape) for part in self.layout().values())

    def layout(self, *, wide: bool = False) -> dict[str, ArraySpec]:
        """name -> what each array keeps of one sample."""
        shape = self.shape
        if self.name == "raw":
            return {"data": ArraySpec("uint8", shape, self.axes)}
        axes = self.axes or tuple(f"axis{i}" for i in range(len(shape)))
        if self.name == "u8":
            maps = len(shape) - self.maps  # axes that count maps
            scale = ArraySpec("float32" if wide else "float16", (*shape[:maps], 2), (*axes[:maps], "scale_offset"))
            return {"data": ArraySpec("uint8", shape, axes), "scale": scale}
        if self.name == "log8":
            return {"data": ArraySpec("uint8", shape, axes), "largest": ArraySpec("float16", shape[:-1], axes[:-1])}
        if self.name.startswith("topk"):
            index = "uint16" if shape[-1] <= 1 << 16 else "uint32"
            top, ranks = (*shape[:-1], self.top), (*axes[:-1], "rank")
            rest = ArraySpec("float32", (*shape[:-1], 1), (*axes[:-1], "mass"))
            return {"data": ArraySpec("float16", top, ranks), "index": ArraySpec(index, top, ranks), "rest": rest}
        return {"data": ArraySpec("float32" if self.name == "f32" else "float16", shape, axes)}

    def encode(self, values: np.ndarray, *, wide: bool = False) -> dict[str, np.ndarray]:
        """The arrays that keep `values` f32 `[n, *shape]`.

        `u8`: per map, code = round((x − offset)/scale), quantized against the offset and scale as they are kept (f16,
        or f32 with `wide`; offset rounded down and scale up, so that every value lies within the codes' range). Error
        at most scale/2.
        `log8`: per row, code = clip(round(16·log2(max/p)), 0, 255) with 255 for zero, against the row's largest value
        as it is kept in f16. Error at most 2.2 % of each p; what is under max/2^15.9 becomes zero.
        `topk`: the k largest logits in f16 with their classes, largest first, and the softmax mass of all others.

        Raises:
            HalfOverflow: `u8` without `wide`, where f16 cannot hold a scale or an offset.
            UserError: f16 cannot hold a value, or `log8` is given a negative one.
        """
        if self.name == "raw":
            return {"data": values}
        if self.name == "f32":
            return {"data": np.ascontiguousarray(values, np.float32)}
        if self.name == "u8":
            return _encode_u8(values, self.maps, wide)
        if self.name == "log8":
            return _encode_log8(values)
        if self.name.startswith("topk"):
            return _encode_topk(values, self.top, self.layout()["index"].dtype)
        return {"data": _half(values, self.name)}

    def decode(self, arrays: Mapping[str, Any]) -> Any:
        """The f32 values `[n, *shape]` that arrays keep: NumPy arrays give NumPy, torch tensors torch on their device.

        `u8`: x = code · scale + offset. `log8`: p = max · 2^(−code/16). `topk`: the logits as kept, and for every other
        class the one value that gives them their mass.
        """
        if self.name == "log8":
            return _decode_log8(arrays)
        if self.name.startswith("topk"):
            return _decode_topk(arrays, self.shape[-1])
        data = _float(arrays["data"])
        if self.name != "u8":
            return data
        pair = _float(arrays["scale"])
        shape = (*pair.shape[:-1], *(1,) * (data.ndim - pair.ndim + 1))
        data *= pair[..., 0].reshape(shape)  # in place: the arrays are large, and this is the student's time
        data += pair[..., 1].reshape(shape)
        return data

    def error(self, values: np.ndarray) -> CodecError:
        """What keeping `values` f32 `[n, *shape]` costs."""
        totals = np.zeros(6)
        for start in range(0, len(values), _SLICE):
            part = values[start : start + _SLICE]
            try:
                arrays = self.encode(part)
            except HalfOverflow:
                arrays = self.encode(part, wide=True)
            before = part.astype(np.float64).reshape(*part.shape[: part.ndim - self.maps], -1)
            after = self.decode(arrays).astype(np.float64).reshape(before.shape)
            norms = np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1)
            cosines = (before * after).sum(-1)[norms > 0] / norms[norms > 0]
            kl = np.zeros(0) if self.values == "plain" else _kl(before, after, self.values)
            squares, differences = (before**2).sum(), ((before - after) ** 2).sum()
            totals += [cosines.sum(), cosines.size, squares, differences, kl.sum(), kl.size]
        cosine, maps, square, difference, divergence, rows = totals.tolist()
        relative = math.sqrt(difference / max(square, 1e-300))
        error = CodecError(relative=relative, cosine=cosine / maps if maps else 1.0)
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


def _encode_u8(values: np.ndarray, maps: int, wide: bool) -> dict[str, np.ndarray]:
    axes = tuple(range(values.ndim - maps, values.ndim))
    low = values.min(axis=axes).astype(np.float64)
    high = values.max(axis=axes).astype(np.float64)
    kind: type[np.floating[Any]] = np.float32 if wide else np.float16
    with np.errstate(over="ignore", invalid="ignore"):
        offset = _round(low, kind, up=False)
        scale = _round((high - offset) / 255, kind, up=True)
    if not ((np.abs(low) <= np.finfo(kind).max).all() and np.isfinite(scale).all()):
        raise HalfOverflow(f"f16 cannot hold scale and offset of values from {low.min():g} to {high.max():g}")
    expand = (..., *(None,) * maps)
    step = scale.astype(np.float32)[expand]
    codes = (values - offset.astype(np.float32)[expand]) / np.where(step > 0, step, 1)
    data = np.clip(np.rint(codes), 0, 255).astype(np.uint8)
    return {"data": data, "scale": np.stack([scale, offset], axis=-1)}


def _round(values: np.ndarray, kind: type[np.floating[Any]], *, up: bool) -> np.ndarray:
    """The neighbor of each value in a float type that does not lie below it (`up`) or above it."""
    near = values.astype(kind)
    wrong = near < values if up else near > values
    return np.where(wrong, np.nextafter(near, kind(np.inf if up else -np.inf)), near)


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
