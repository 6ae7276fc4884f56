"""The names of the taps, and what each gives."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple, Self, cast

from torch import Tensor

from precompute.taps.activations import At, resize_matrix
from storage.errors import UserError, did_you_mean
from storage.store.codecs import Values
from storage.store.manifests import Antialias, TargetIdentity


class TapInfo(NamedTuple):
    """What a tap gives: axes of one sample's tensor, how many of the last make a map, whether layers can be chosen."""

    axes: tuple[str, ...]
    maps: int
    layered: bool
    values: Values = "plain"


TAPS: dict[str, TapInfo] = {
    "activations": TapInfo(("channel", "y", "x"), 2, True),
    "q": TapInfo(("layer", "head", "token", "width"), 2, True),
    "k": TapInfo(("layer", "head", "token", "width"), 2, True),
    "v": TapInfo(("layer", "head", "token", "width"), 2, True),
    "class_row": TapInfo(("layer", "head", "token"), 1, True, "rows"),
    "attention": TapInfo(("layer", "head", "query", "token"), 1, True, "rows"),
    "tokens": TapInfo(("layer", "token", "width"), 1, True),
    "class_token": TapInfo(("width",), 1, False),
    "embedding": TapInfo(("width",), 1, False),
    "logits": TapInfo(("class",), 1, False, "logits"),
}
ATTENTION = ("q", "k", "v", "class_row", "attention")  # read off attention layers
VIT = (*ATTENTION, "tokens", "class_token")


@dataclass(frozen=True, slots=True)
class Tap:
    """What to read: a tap, with layers (from 1; stages of a CNN) and, for activations, the side of their grid.

    Activations are read `at` the last norm of a stage's last block, or after that block's residual sum, and resized
    with `antialias` as in `F.interpolate` (`all`), without it (False), or with it only where a stage is larger than the
    grid (True, as targets of older stores were made).

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
        )

    def grid_matrix(self, side: int) -> Tensor:
        """The matrix that brings an axis of activation maps of this side onto the tap's grid (`resize_matrix`)."""
        grid = int(self.grid or 0)
        return resize_matrix(side, grid, self.antialias == "all" or (self.antialias and grid < side))

    def grid_name(self, side: int) -> str:
        """A name for that matrix, the same for all taps that share it."""
        words = {False: "", True: "_antialias_reduced", "all": "_antialias"}
        return f"grid_{side}_{self.grid}{words[self.antialias]}"

    @property
    def chosen(self) -> tuple[str, ...]:
        """Names of the tensors of a ready graph that are read, in order."""
        return tuple(self.tensors[n - 1] for n in self.layers) if self.layers else self.tensors


def check_tap(name: str) -> str:
    """The tap's name; UserError with the nearest one where there is no such tap."""
    if name not in TAPS:
        raise UserError(f"no tap is called {name!r}", hint=did_you_mean(name, TAPS))
    return name
