"""Affine quantization: codes of 8 or 4 bits with a scale and an offset for each unit, and two codes a byte."""

from __future__ import annotations

from typing import Any

import numpy as np

from storage.errors import UserError

GROUP = 32  # numbers of a vector that share a scale in `u4`: one scale a token is spoiled by a few large channels


class HalfOverflow(UserError):
    """f16 cannot hold a map's scale or offset: all of the array's are kept in f32 (`wide`)."""


def quantize(values: np.ndarray, axes: int, bits: int, wide: bool) -> tuple[np.ndarray, np.ndarray]:
    """Codes u8 of the shape of `values`, and scale and offset `[…, 2]` of each unit, which is the last `axes` axes.

    code = round((x − offset)/scale), quantized against the offset and scale as they are kept (f16, or f32 with `wide`;
    offset rounded down and scale up, so that every value lies within the codes' range). Error at most scale/2.

    Raises:
        HalfOverflow: without `wide`, where f16 cannot hold a scale or an offset.
    """
    unit = tuple(range(values.ndim - axes, values.ndim))
    low = values.min(axis=unit).astype(np.float64)
    high = values.max(axis=unit).astype(np.float64)
    largest = 2**bits - 1
    kind: type[np.floating[Any]] = np.float32 if wide else np.float16
    with np.errstate(over="ignore", invalid="ignore"):
        offset = _round(low, kind, up=False)
        scale = _round((high - offset) / largest, kind, up=True)
    if not ((np.abs(low) <= np.finfo(kind).max).all() and np.isfinite(scale).all()):
        raise HalfOverflow(f"f16 cannot hold scale and offset of values from {low.min():g} to {high.max():g}")
    expand = (..., *(None,) * axes)
    step = scale.astype(np.float32)[expand]
    codes = (values - offset.astype(np.float32)[expand]) / np.where(step > 0, step, 1)
    return np.clip(np.rint(codes), 0, largest).astype(np.uint8), np.stack([scale, offset], axis=-1)


def dequantize(codes: Any, scale: Any) -> Any:
    """f32 values of codes (f32, changed in place) with scale and offset `[…, 2]`: x = code · scale + offset."""
    expand = (..., *(None,) * (codes.ndim + 1 - scale.ndim))
    codes *= scale[..., 0][expand]
    codes += scale[..., 1][expand]
    return codes


def _round(values: np.ndarray, kind: type[np.floating[Any]], *, up: bool) -> np.ndarray:
    """The neighbor of each value in a float type that does not lie below it (`up`) or above it."""
    near = values.astype(kind)
    wrong = near < values if up else near > values
    return np.where(wrong, np.nextafter(near, kind(np.inf if up else -np.inf)), near)


def new_f32(shape: tuple[int, ...], like: Any) -> Any:
    """An f32 array without values: of NumPy, or of torch on the device of another tensor."""
    if isinstance(like, np.ndarray):
        return np.empty(shape, np.float32)
    import torch

    return like.new_empty(shape, dtype=torch.float32)


def groups(width: int) -> int:
    """How many groups of `GROUP` numbers a vector has; the last may be shorter."""
    return -(-width // GROUP)


def grouped(vectors: Any) -> Any:
    """Vectors `[…, width]` as `[…, groups, GROUP]`; a shorter last group repeats the last number."""
    width = vectors.shape[-1]
    if missing := groups(width) * GROUP - width:
        last = vectors[..., -1:]
        if isinstance(vectors, np.ndarray):
            vectors = np.concatenate([vectors, np.repeat(last, missing, -1)], -1)
        else:
            import torch

            vectors = torch.cat([vectors, last.expand(*last.shape[:-1], missing)], -1)
    return vectors.reshape(*vectors.shape[:-1], -1, GROUP)


def packed(codes: np.ndarray) -> np.ndarray:
    """Codes of four bits `[n, …]`, two a byte `[n, ceil(V/2)]`.

    Number i of a sample's V codes, in C order, is the low half of byte i; number i + ceil(V/2) is the high half of it.
    """
    flat = codes.reshape(len(codes), -1)
    half = -(-flat.shape[1] // 2)
    data = flat[:, :half].copy()
    data[:, : flat.shape[1] - half] |= flat[:, half:] << 4
    return data


def unpacked(data: Any, shape: tuple[int, ...]) -> Any:
    """The codes of `packed`, f32 `[n, *shape]`."""
    count = int(np.prod(shape))
    flat, half = new_f32((len(data), count), data), data.shape[1]
    flat[:, :half] = data & 15
    flat[:, half:] = (data >> 4)[:, : count - half]
    return flat.reshape(len(data), *shape)
