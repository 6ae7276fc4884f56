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


def layout(codec: str, shape: tuple[int, ...], maps: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """name -> (dtype, shape of one sample) of the arrays that a codec makes from one sample's `shape`."""
    if codec == "u8":
        return {"data": ("uint8", shape), "scale": ("float16", (*shape[: len(shape) - maps], 2))}
    return {"data": ("float32" if codec == "f32" else "float16", shape)}


def encode(codec: str, values: np.ndarray, maps: int) -> dict[str, np.ndarray]:
    """The arrays that keep `values` f32 `[n, …]`.

    `u8`: per map, code = round((x − offset)/scale), quantised against the offset and scale as they are kept (f16,
    offset rounded down and scale up, so that every value lies within the codes' range). Error at most scale/2.

    Raises:
        UserError: values that f16 cannot hold.
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
    low = values.min(axis=axes).astype(np.float32)
    high = values.max(axis=axes).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        offset = _half(low, up=False)
        scale = _half((high - offset.astype(np.float32)) / np.float32(255), up=True)
    if not ((np.abs(low) <= np.finfo(np.float16).max).all() and np.isfinite(scale).all()):
        raise UserError(
            f"codec u8 keeps scale and offset in f16, which cannot hold values from {low.min():g} to {high.max():g}; "
            "use codec=f32"
        )
    expand = (..., *(None,) * maps)
    step = scale.astype(np.float32)[expand]
    codes = (values - offset.astype(np.float32)[expand]) / np.where(step > 0, step, 1)
    data = np.clip(np.rint(codes), 0, 255).astype(np.uint8)
    return {"data": data, "scale": np.stack([scale, offset], axis=-1)}


def _half(values: np.ndarray, *, up: bool) -> np.ndarray:
    """The f16 neighbour of each value that does not lie below it (`up`) or above it."""
    near = values.astype(np.float16)
    wrong = near.astype(np.float32) < values if up else near.astype(np.float32) > values
    return np.where(wrong, np.nextafter(near, np.float16(np.inf if up else -np.inf)), near)


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
