"""A target over all its shards and views as one lazy dask array, for analyses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import dask
import dask.array
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from storage.store.codecs import Codec
    from storage.store.markers import Marker


def dask_array(markers: Sequence[Marker], codec: Codec) -> dask.array.Array:
    """The decoded values of all markers, one after another, f32 `[samples, …]`; nothing is read before it is computed.

    Raises:
        DamageError: a marker with other arrays than the codec makes.
    """

    def load(marker: Marker, start: int, stop: int) -> np.ndarray:
        values: np.ndarray = codec.decode({name: array.read(start, stop) for name, array in marker.arrays.items()})
        return values

    parts = []
    for marker in markers:
        marker.require(marker.samples, codec)
        step = marker.arrays["data"].metadata.chunk_shape[0]
        for start in range(0, marker.samples, step):
            stop = min(start + step, marker.samples)
            piece = dask.delayed(load, pure=True)(marker, start, stop)  # type: ignore[attr-defined]
            parts.append(dask.array.from_delayed(piece, (stop - start, *codec.shape), np.float32))  # type: ignore[no-untyped-call]
    return dask.array.concatenate(parts)  # type: ignore[no-untyped-call, no-any-return]
