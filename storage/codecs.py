"""Codecs: how a target is kept. NumPy encodes where the teacher runs; decoding works on NumPy and on torch alike.

A codec turns f32 values `[n, …]` into named arrays with the same first axis. `maps` says how many of the last axes
make one map, the unit that `u8` scales: 2 for activations `[n, C, g, g]`, 1 for a class row `[n, L, H, N]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from storage.errors import UserError, nearest

CODECS = ("f32", "f16", "u8")


def check(codec: str) -> str:
    """The codec's name; UserError with the nearest one where there is no such codec."""
    if codec not in CODECS:
        raise UserError(f"no codec is called {codec!r}. {nearest(codec, CODECS)}")
    return codec


def sample_bytes(codec: str, shape: tuple[int, ...], maps: int) -> int:
    """Bytes that one sample takes at rest."""
    return sum(int(np.dtype(kind).itemsize * np.prod(part)) for kind, part in layout(codec, shape, maps).values())


def error(codec: str, values: np.ndarray, maps: int) -> dict[str, float]:
    """What keeping `values` f32 `[n, …]` costs: ‖x − x′‖ ÷ ‖x‖, and the mean cosine of maps before and after."""
    try:
        kept = encode(codec, values, maps)
    except HalfOverflow:
        kept = encode(codec, values, maps, wide=True)
    before = values.astype(np.float64).reshape(*values.shape[: values.ndim - maps], -1)
    after = decode(codec, kept).astype(np.float64).reshape(before.shape)
    norms = np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1)
    cosines = (before * after).sum(-1)[norms > 0] / norms[norms > 0]
    relative = np.linalg.norm(before - after) / max(float(np.linalg.norm(before)), 1e-300)
    return {"relative": float(relative), "cosine": float(cosines.mean()) if cosines.size else 1.0}


class HalfOverflow(UserError):
    """f16 cannot hold a map's scale or offset: all of the array's are kept in f32 (`wide`)."""


def layout(
    codec: str, shape: tuple[int, ...], maps: int, *, wide: bool = False
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """name -> (dtype, shape of one sample) of the arrays that a codec makes from one sample's `shape`."""
    if codec == "u8":
        scale = (*shape[: len(shape) - maps], 2)
        return {"data": ("uint8", shape), "scale": ("float32" if wide else "float16", scale)}
    return {"data": ("float32" if codec == "f32" else "float16", shape)}


def encode(codec: str, values: np.ndarray, maps: int, *, wide: bool = False) -> dict[str, np.ndarray]:
    """The arrays that keep `values` f32 `[n, …]`.

    `u8`: per map, code = round((x − offset)/scale), quantised against the offset and scale as they are kept (f16, or
    f32 with `wide`; offset rounded down and scale up, so that every value lies within the codes' range). Error at most
    scale/2.

    Raises:
        HalfOverflow: `u8` without `wide`, where f16 cannot hold a scale or an offset.
        UserError: `f16`, where f16 cannot hold a value.
    """
    if codec == "f32":
        return {"data": np.ascontiguousarray(values, np.float32)}
    if codec == "f16":
        with np.errstate(over="ignore"):
            data = values.astype(np.float16)
        if not np.isfinite(data).all():
            raise UserError(f"codec f16 cannot hold values up to {np.abs(values).max():g}; use codec=f32 or codec=u8")
        return {"data": data}
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
    """The neighbour of each value in a float type that does not lie below it (`up`) or above it."""
    near = values.astype(kind)
    wrong = near < values if up else near > values
    return np.where(wrong, np.nextafter(near, kind(np.inf if up else -np.inf)), near)


def decode(codec: str, arrays: Mapping[str, Any]) -> Any:
    """The f32 values `[n, …]` that arrays keep: NumPy arrays give NumPy, torch tensors torch on their device.

    `u8`: x = code · scale + offset.
    """
    data = _float(arrays["data"])
    if codec != "u8":
        return data
    pair = _float(arrays["scale"])
    shape = (*pair.shape[:-1], *(1,) * (data.ndim - pair.ndim + 1))
    data *= pair[..., 0].reshape(shape)  # in place: the arrays are large, and this is the student's time
    data += pair[..., 1].reshape(shape)
    return data


def _float(array: Any) -> Any:
    return array.astype(np.float32) if isinstance(array, np.ndarray) else array.float()
