"""What is drawn of a target's value: one map over the image, one line of numbers, or the most probable classes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from storage.store.manifests import TargetManifest, TeacherManifest

TOP = 5  # classes that are shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One picture of a value.

    Attributes:
        values: a map `[g, g]`, a line `[n]`, or probabilities `[n]` with their classes, the largest first.
        note: its title.
        classes: names of the classes; none for a map or a line.
    """

    values: np.ndarray
    note: str
    classes: list[str] = field(default_factory=list)


def cell(target: TargetManifest, teacher: TeacherManifest, values: np.ndarray) -> Cell:
    """What is drawn of one sample's decoded value, f32 of the shape that the target's manifest says."""
    tap, prefix = target.identity.tap, len(teacher.prefix)
    if tap == "logits":
        return _classes(values, teacher.classes)
    if tap == "activations":
        return _ranged(_mean_map(_last_stage(target, values)))
    if tap in ("class_row", "attention"):
        row = _attention_row(target, teacher, values)
        tokens = "class token" if teacher.prefix == ("class",) else f"{prefix} prefix tokens"
        note = f"{tokens} {100 * row[:prefix].sum():.0f} %, " if prefix else ""
        return _over_patches(row[prefix:], note)
    if tap in ("q", "k", "v"):
        return _over_patches(np.linalg.norm(_last(target, values)[:, prefix:], axis=(0, 2)))
    if tap == "tokens":
        return _over_patches(np.linalg.norm(_last(target, values)[prefix:], axis=1))
    return _ranged(values.ravel())


def meaning(target: TargetManifest, teacher: TeacherManifest) -> str:
    """What such a cell shows, in words."""
    tap, layers, shape = target.identity.tap, target.identity.layers, target.sample_shape
    where = f"layer {max(layers)}" if layers else "after the final norm"
    if tap == "logits":
        return "the most probable classes"
    if tap == "activations":
        last = max(target.stages, key=lambda stage: stage.stage)
        return f"stage {last.stage}: mean magnitude of its {last.channels} maps, each ÷ its largest"
    if tap == "class_row" or (tap == "attention" and "class" in teacher.prefix):
        return f"{where}: attention of the class token to each patch, mean of {shape[1]} heads"
    if tap == "attention":
        return f"{where}: attention to each patch, mean of {shape[1]} heads and all queries"
    if tap in ("q", "k", "v"):
        name = {"q": "query", "k": "key", "v": "value"}[tap]
        return f"{where}: length of each patch's {name}, all heads together"
    if tap == "tokens":
        return f"{where}: length of each patch's token"
    return "its values, one after another"


def _last(target: TargetManifest, values: np.ndarray) -> np.ndarray:
    """The value of the last layer, in whatever order the layers were asked for."""
    last: np.ndarray = values[np.argmax(target.identity.layers or (1,))]
    return last


def _last_stage(target: TargetManifest, values: np.ndarray) -> np.ndarray:
    """The maps of the last stage, `[c, g, g]`, of those of all stages after another."""
    ends = np.cumsum([stage.channels for stage in target.stages])
    stages = zip(target.stages, np.split(values, ends[:-1]), strict=True)
    return max(stages, key=lambda pair: pair[0].stage)[1]


def _mean_map(maps: np.ndarray) -> np.ndarray:
    """Mean `[g, g]` of the magnitudes of maps `[c, g, g]`, each divided by its largest, so that none drowns the others.

    Of the magnitudes: maps are read after a normalization, where a strong answer may well be a negative one.
    """
    sizes = np.abs(maps)
    mean: np.ndarray = (sizes / np.maximum(sizes.max((1, 2), keepdims=True), 1e-12)).mean(0)
    return mean


def _attention_row(target: TargetManifest, teacher: TeacherManifest, values: np.ndarray) -> np.ndarray:
    """Attention to all tokens `[N]` of the last layer, mean of heads: the class query's, or that of all queries."""
    heads, prefix = _last(target, values), teacher.prefix  # [H, N] or [H, N, N]
    if heads.ndim == 3:
        heads = heads[:, prefix.index("class")] if "class" in prefix else heads.mean(1)
    row: np.ndarray = heads.mean(0)
    return row


def _over_patches(values: np.ndarray, note: str = "") -> Cell:
    """A map of values of patches, row after row; a line where they make no square."""
    side = math.isqrt(len(values))
    return _ranged(values.reshape(side, side) if side * side == len(values) else values, note)


def _ranged(values: np.ndarray, note: str = "") -> Cell:
    return Cell(values=values, note=f"{note}{values.min():.2g} to {values.max():.2g}")


def _classes(logits: np.ndarray, names: Sequence[str] | None) -> Cell:
    exact = np.exp(logits.astype(np.float64) - logits.max())
    shares = exact / exact.sum()
    best = np.argsort(-shares, kind="stable")[:TOP]
    classes = [names[n] if names and len(names) == len(shares) else f"class {n}" for n in best]
    note = f"{100 * shares[best].sum():.0f} % on these {len(best)} of {len(shares):,}"
    return Cell(values=shares[best], note=note, classes=classes)
