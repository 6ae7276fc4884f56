"""The names of the taps, and what each gives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from precompute.taps.activations import At, resize_matrix
from storage.errors import UserError, did_you_mean
from storage.store.codecs import Values
from storage.store.manifests import Antialias, TargetIdentity


class TapInfo(NamedTuple):
    """What a tap gives, and what gives it.

    Attributes:
        axes: of one sample's tensor.
        maps: how many of the last axes make one map.
        vit: whether only networks whose attention can be read have it.
        values: what they are.
        codec: how they are kept where nothing is said.
        graph: axes of the tensor of a ready graph that may give it; empty where none may.
        usual: the kinds of network of which it is kept where nothing is said.
    """

    axes: tuple[str, ...]
    maps: int
    vit: bool = False
    values: Values = "plain"
    codec: str = "f16"
    graph: tuple[str, ...] = ()
    usual: tuple[str, ...] = ()

    @property
    def layered(self) -> bool:
        """Whether it is of layers or stages, which can be chosen."""
        return self.axes[0] in ("layer", "channel")

    @property
    def gridded(self) -> bool:
        """Whether its maps are resized to a grid."""
        return self.axes[-2:] == ("y", "x")


_VECTORS, _ROWS = ("layer", "head", "token", "width"), ("layer", "head", "token")
TAPS: dict[str, TapInfo] = {
    "activations": TapInfo(("channel", "y", "x"), 2, codec="u8", graph=("B", "C", "h", "h"), usual=("cnn", "other")),
    "q": TapInfo(_VECTORS, 1, vit=True),
    "k": TapInfo(_VECTORS, 1, vit=True),
    "v": TapInfo(_VECTORS, 1, vit=True),
    "class_row": TapInfo(_ROWS, 1, vit=True, values="rows", graph=("B", "H", "N"), usual=("vit",)),
    "attention": TapInfo(("layer", "head", "query", "token"), 1, vit=True, values="rows", graph=("B", "H", "N", "N")),
    "tokens": TapInfo(("layer", "token", "width"), 1, vit=True, graph=("B", "N", "D")),
    "class_token": TapInfo(("width",), 1, vit=True, graph=("B", "D"), usual=("vit",)),
    "embedding": TapInfo(("width",), 1, graph=("B", "D")),
    "logits": TapInfo(("class",), 1, values="logits", codec="f32", graph=("B", "K")),
}
ATTENTION = tuple(name for name, info in TAPS.items() if "head" in info.axes)  # read off attention layers
OF_CLASS_TOKEN = ("class_row", "class_token")


@dataclass(frozen=True, slots=True)
class Tap:
    """What to read: a tap, with layers (from 1; stages of a CNN) and, for activations, the side of their grid.

    Activations are read `at` the last norm of a stage's last block, after that block's residual sum (`block`), or as
    timm's `forward_intermediates` gives them of any network (`stage`). They are resized with `antialias` as in
    `F.interpolate` (`all`), without it (False), or with it only where a stage is larger than the grid (True, as targets
    of older stores were made). `native` maps are resized only where they are larger than the grid.

    Without layers: all of them; of `tokens`, those after the final norm, else the residual stream after each layer.
    Of a ready graph also the names of its tensors, one a layer of the tap; `layers` chooses among them.
    """

    name: str
    _: KW_ONLY
    layers: tuple[int, ...] | None = None
    grid: int | None = None
    tensors: tuple[str, ...] = ()
    at: At = "norm"
    antialias: Antialias = False
    native: bool = False

    @classmethod
    def of(cls, identity: TargetIdentity) -> Self:
        """What a target's identity says."""
        return cls(
            identity.tap,
            layers=identity.layers,
            grid=identity.grid,
            tensors=identity.tensors,
            at=cast(At, identity.at),
            antialias=identity.antialias,
            native=identity.native,
        )

    @property
    def info(self) -> TapInfo:
        """What the tap gives."""
        return TAPS[self.name]

    def stored_side(self, side: int) -> int:
        """The side on which maps of this side are given: the grid, or their own where native maps are smaller."""
        grid = int(self.grid or 0)
        return min(side, grid) if self.native else grid

    def add_matrices(self, module: nn.Module, sides: Iterable[int]) -> None:
        """Give a module the matrices for maps of these sides as buffers: they are constants of its graph."""
        for side in sides:
            if self.stored_side(side) == self.grid and not hasattr(module, self.grid_name(side)):
                module.register_buffer(self.grid_name(side), self.grid_matrix(side))

    def one_tensor(self, module: nn.Module, stages: Iterable[Tensor]) -> Tensor:
        """The tap's tensor of each stage's maps `[B, C, side, side]`, by the matrices that a module was given.

        `[B, channels, g, g]`; of native maps `[B, V]`, one side after another, as the store takes them
        (`storage.store.native_maps`).
        """
        maps = [self._on_grid(module, each) for each in stages]
        if not self.native:
            return torch.cat(maps, 1)
        sides = dict.fromkeys(each.shape[-1] for each in maps)
        by_side = [torch.cat([each for each in maps if each.shape[-1] == side], 1) for side in sides]
        return torch.cat([each.flatten(1) for each in by_side], 1)

    def _on_grid(self, module: nn.Module, maps: Tensor) -> Tensor:
        side = maps.shape[-1]
        if self.stored_side(side) != self.grid:
            return maps
        matrix = module.get_buffer(self.grid_name(side))
        return matrix @ maps @ matrix.T

    def grid_matrix(self, side: int) -> Tensor:
        """The matrix that brings an axis of activation maps of this side onto the tap's grid (`resize_matrix`)."""
        grid = int(self.grid or 0)
        return resize_matrix(side, grid, self.antialias == "all" or (self.antialias and grid < side))

    def grid_name(self, side: int) -> str:
        """A name for that matrix, the same for all taps that share it."""
        words = {False: "", True: "_antialias_reduced", "all": "_antialias"}
        return f"grid_{side}_{self.grid}{words[self.antialias]}"

    def numbers(self, count: int) -> Sequence[int]:
        """The layers or stages that are read, from 1, of so many."""
        return self.layers or range(1, count + 1)

    @property
    def chosen(self) -> tuple[str, ...]:
        """Names of the tensors of a ready graph that are read, in order."""
        return tuple(self.tensors[n - 1] for n in self.layers) if self.layers else self.tensors


def check_tap(name: str) -> str:
    """The tap's name; UserError with the nearest one where there is no such tap."""
    if name not in TAPS:
        raise UserError(f"no tap is called {name!r}", hint=did_you_mean(name, TAPS))
    return name
