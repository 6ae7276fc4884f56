"""Native grids: activation maps that are kept on their own sides, and resized when they are decoded.

A 7×7 map on a 14×14 grid is a linear image of its 49 numbers: x = M · map · Mᵀ. The matrices are in the target's
manifest, so a reader needs to know nothing about kernels. Decoding works on NumPy and on torch alike.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from storage.store.quantize import new_f32

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeMaps:
    """Which maps are kept on which side.

    Attributes:
        grid: side of the decoded maps.
        stages: (channels, side) of each stage, in the order of the decoded channels; no side is above the grid.
        matrices: (side, M `[grid, side]`) of each side below the grid.
    """

    grid: int
    stages: tuple[tuple[int, int], ...]
    matrices: tuple[tuple[int, Matrix], ...]

    @property
    def channels(self) -> dict[int, int]:
        """Side -> how many maps have it, in the order in which sides first occur."""
        sides = dict.fromkeys(side for _, side in self.stages)
        return {side: sum(count for count, own in self.stages if own == side) for side in sides}

    def split(self, flat: Any) -> dict[int, Any]:
        """Side -> its maps `[n, channels, side, side]`, of all maps `[n, V]` one side after another."""
        maps, start = {}, 0
        for side, count in self.channels.items():
            stop = start + count * side * side
            maps[side] = flat[:, start:stop].reshape(len(flat), count, side, side)
            start = stop
        return maps

    def join(self, maps: Mapping[int, Any]) -> Any:
        """Decoded maps `[n, C, grid, grid]` of each side's maps, f32."""
        first = next(iter(maps.values()))
        shape = (len(first), sum(count for count, _ in self.stages), self.grid, self.grid)
        joined = new_f32(shape, first)
        resized = {side: self._resized(side, own) for side, own in maps.items()}
        for side, read, written in self._places():
            joined[:, written] = resized[side][:, read]
        return joined

    def _places(self) -> Iterator[tuple[int, slice, slice]]:
        """(side, channels among those of the side, decoded channels) of each stage."""
        taken, start = dict.fromkeys(self.channels, 0), 0
        for count, side in self.stages:
            yield side, slice(taken[side], taken[side] + count), slice(start, start + count)
            taken[side], start = taken[side] + count, start + count

    def _resized(self, side: int, maps: Any) -> Any:
        matrix = dict(self.matrices).get(side)
        if matrix is None:
            return maps
        if isinstance(maps, np.ndarray):
            along = np.array(matrix, np.float32)
            return along @ (maps @ along.T)
        import torch

        along = _on_device(matrix, maps.device)
        with torch.autocast(maps.device.type, enabled=False):  # a loop of one's own may decode within it
            return along @ (maps @ along.T)


@functools.lru_cache(maxsize=256)
def _on_device(matrix: Matrix, device: Any) -> Any:
    import torch

    return torch.tensor(matrix, dtype=torch.float32, device=device)
