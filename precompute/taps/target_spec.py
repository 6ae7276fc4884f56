"""What a user asks for, parsed: a target as `TAP,layers=…,grid=…,codec=…`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING

from storage.errors import UserError, did_you_mean, setting
from storage.store import codecs

if TYPE_CHECKING:
    from precompute.taps import At


_OPTIONS = ("layers", "grid", "codec", "at", "antialias", "native")


@dataclass(frozen=True, slots=True)
class TargetSpec:
    """One target that a user asks for.

    Attributes:
        tap: what is read, such as `activations`, `class_row` or `logits`.
        layers: as `1:4+8` or `last`, counted from 1; None for all.
        grid: side that activations are resized to.
        codec: how values are kept; None for the tap's usual one.
        tensors: of a ready `model.onnx`, the tensors that give the tap.
        at: whether activations are read after a stage's last `norm`, its last `block`, or as timm gives them of each
            `stage`; None for `norm` of a CNN whose stages are known, else `stage`.
        antialias: whether activations are resized with antialiasing.
        native: whether activations are kept on their own sides where these are below the grid; None for yes, unless the
            store has them resized.
    """

    tap: str
    _: KW_ONLY
    layers: str | None = None
    grid: int | None = None
    codec: str | None = None
    tensors: tuple[str, ...] = ()
    at: At | None = None
    antialias: bool = False
    native: bool | None = None


def parse_target(text: str) -> list[TargetSpec]:
    """The targets that a text asks for, one for each tap.

    Args:
        text: `TAP[,TAP…][,layers=last|1:4+8][,grid=G][,codec=C]`; activations also take
            `at=norm|block|stage`, `antialias=true|false` and `native=true|false`.

    Raises:
        UserError: an unknown tap, option or codec, with the nearest known one.
    """
    try:
        return _parse(text)
    except UserError as error:
        raise UserError(error.message, setting=setting("target", text), hint=error.hint) from None


def _parse(text: str) -> list[TargetSpec]:
    from precompute.taps import TAPS, check_tap

    parts = [part.strip() for part in text.split(",")]
    taps = [check_tap(part) for part in parts if "=" not in part]
    options = dict(part.split("=", 1) for part in parts if "=" in part)
    for option in options:
        if option not in _OPTIONS:
            raise UserError(f"no option is called {option!r}", hint=did_you_mean(option, _OPTIONS))
    if not taps:
        raise UserError("names no tap", hint=did_you_mean("", TAPS))
    of_maps = _maps(taps, options)
    if "layers" in options and not all(TAPS[tap].layered for tap in taps):
        raise UserError(f"{', '.join(t for t in taps if not TAPS[t].layered)} has no layers to choose")
    codec = options.get("codec")
    if codec is not None:
        for tap in taps:
            codec = codecs.check_codec(codec, TAPS[tap].values)
    return [replace(of_maps, tap=tap, layers=options.get("layers"), codec=codec) for tap in taps]


def _maps(taps: Sequence[str], options: Mapping[str, str]) -> TargetSpec:
    """What is said of activations alone: `grid`, `at`, `antialias` and `native`."""
    from precompute.taps import POSITIONS, TAPS

    alone = {
        "grid": "resized to a grid",
        "at": "read at a place of their own",
        "antialias": "resized",
        "native": "kept on their own sides",
    }
    for option, what in alone.items():
        if option in options and not all(TAPS[tap].gridded for tap in taps):
            raise UserError(f"only activations are {what}")
    grid, place = options.get("grid"), options.get("at")
    if grid is not None and not re.fullmatch(r"[1-9]\d{0,2}", grid):
        raise UserError(f"grid={grid}: expected a number of patches a side, 1 to 999")
    at = next((known for known in POSITIONS if known == place), None)
    if at is None and place is not None:
        raise UserError(
            f"at={place}: expected norm (a stage's last normalization), block (its last block, after the residual sum) "
            "or stage (what timm's forward_intermediates gives)"
        )
    flags = {name: options[name] for name in ("antialias", "native") if name in options}
    for name, value in flags.items():
        if value not in ("true", "false"):
            raise UserError(f"{name}={value}: expected true or false")
    side, native = None if grid is None else int(grid), flags.get("native")
    antialias = flags.get("antialias") == "true"
    return TargetSpec("", grid=side, at=at, antialias=antialias, native=None if native is None else native == "true")


def layer_numbers(text: str | None, count: int, what: str) -> tuple[int, ...]:
    """The layers that `last`, `3`, `1:4` or `1:4+8` names, from 1, ends included; all without a text.

    Raises:
        UserError: not such a text, or a layer that is not there.
    """
    if text is None:
        return tuple(range(1, count + 1))
    numbers: list[int] = []
    for part in text.split("+"):
        match = re.fullmatch(r"(\d{1,9})(?::(\d{1,9}))?", part)
        if part == "last":
            numbers.append(count)
        elif match:
            first, last = int(match[1]), int(match[2] or match[1])
            numbers += range(first, last + 1) if first <= last <= count else [0]  # 0 is refused below
        else:
            raise UserError(f"layers={text}: expected last, a number, a range 1:4, or several joined by +")
    if not numbers or len(set(numbers)) < len(numbers) or not all(1 <= n <= count for n in numbers):
        raise UserError(f"layers={text}: {what} has layers 1 to {count}, each named once")
    return tuple(numbers)


def parse_ranges(layers: Sequence[int]) -> str:
    """Layers as a target's text has them, such as `1:4+8`."""
    runs: list[list[int]] = []
    for n in layers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return "+".join(str(a) if a == b else f"{a}:{b}" for a, b in runs)
