"""The demo's two pictures: how its students learned, and where teachers and students look."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from pipeline.inspection.cells import cell
from pipeline.plotting import COLORS, MAP, figure, limits, save
from precompute.engine.session import open_session
from precompute.taps import AttentionTaps, attention_layers
from storage.shards.shard import open_shards
from storage.views.normalize import normalize
from student.evaluation.batches import evaluation_batches
from student.models.files import StudentDescription, load_student

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from storage.store.store import Store

MARKERS = ("o", "s", "^", "D")
DIGITS = 8  # that are looked at


def curves(out: Path, runs: Mapping[str, Sequence[Path]], teachers: Mapping[str, float]) -> None:
    """Draw held-out top-1 over the epochs, mean and range of the seeds, beside each seed's last value.

    Args:
        out: where the PNG goes.
        runs: recipe -> run folders, a seed each.
        teachers: name -> top-1.
    """
    drawn = figure(7.5, 4.4)
    drawn.set_layout_engine("constrained")
    left, right = drawn.subplots(1, 2, width_ratios=[3, 2], sharey=True)
    for i, (recipe, folders) in enumerate(runs.items()):
        color, marker = COLORS[i], MARKERS[i]
        learned = [_learned(folder) for folder in folders]
        epochs, values = learned[0][0], np.array([top1 for _, top1 in learned])
        left.fill_between(epochs, values.min(0), values.max(0), color=color, alpha=0.18, linewidth=0)
        left.plot(epochs, values.mean(0), color=color, marker=marker, markersize=5, label=recipe)
        right.plot([i] * len(values), values[:, -1], marker, color=color, alpha=0.55)
        right.plot([i - 0.25, i + 0.25], [values[:, -1].mean()] * 2, color=color, linewidth=2.5)
    for name, top1 in teachers.items():
        style = "--" if name == "cnn" else ":"
        for axes in (left, right):
            axes.axhline(top1, color="0.35", linestyle=style, linewidth=1, label=f"teacher {name}")
    left.set(xlabel="epoch", ylabel="top-1 on held-out digits, %", title="while they learn", ylim=(0, 102))
    right.set(title="in the end", xlim=(-0.6, len(runs) - 0.4))
    right.set_xticks(range(len(runs)), [name.replace("-", "-\n") for name in runs])
    drawn.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    drawn.suptitle("mean and range of the seeds; teachers saw all labels, students a tenth", fontsize="medium")
    save(drawn, out)


def _learned(run: Path) -> tuple[list[int], list[float]]:
    """Epochs, counted from 1, and the top-1 after each, where it was measured."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    scored = [line for line in lines if "top1" in line]
    return [line["epoch"] + 1 for line in scored], [line["top1"] for line in scored]


def attention(out: Path, store: Store, val: Sequence[str], runs: Mapping[str, Path]) -> None:
    """Draw what teachers and students look at in some held-out digits.

    Of a CNN the magnitudes of its last maps, each divided by its largest; of ViTs the class query's attention
    in the last layer. Means over maps and heads.

    Args:
        out: where the PNG goes.
        store: with the teachers' graphs.
        val: shards of held-out digits.
        runs: recipe -> run folder.
    """
    students = {recipe: load_student(folder / "last.safetensors") for recipe, folder in runs.items()}
    images = _different(val, next(iter(students.values()))[1])
    rows = _by_teachers(store, images)
    rows |= {f"student,\n{recipe}": _by_student(model, about, images) for recipe, (model, about) in students.items()}
    drawn = figure(0.75 * DIGITS + 1.3, 0.75 * len(rows) + 1.3)
    drawn.set_layout_engine("constrained")
    panels = drawn.subplots(len(rows) + 1, DIGITS)
    side = images.shape[1]
    look = {"cmap": MAP, "extent": (0, side, side, 0), "interpolation": "nearest"}
    for column, image in enumerate(images):
        panels[0, column].imshow(image)
        for axes, maps in zip(panels[1:, column], rows.values(), strict=True):
            low, high = limits(maps[column].min(), maps[column].max())
            axes.imshow(maps[column], vmin=low, vmax=high, **look)
            axes.contour(image[..., 0], levels=[128], colors="white", linewidths=0.9)
    for name, axes in zip(["held-out\ndigits", *rows], panels[:, 0], strict=True):
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[])
    drawn.suptitle("where they look (bright is much; each map on its own scale)")
    save(drawn, out)


def _different(shards: Sequence[str], about: StudentDescription) -> np.ndarray:
    """Images uint8 `[DIGITS, S, S, 3]` of different classes, as a student is evaluated on them."""
    (batch,) = evaluation_batches(open_shards(shards), about.evaluation_policy, 1 << 20)
    first = {int(label): i for i, label in reversed([*enumerate(batch.labels)])}
    return batch.images[[first[label] for label in sorted(first)[:DIGITS]]].numpy()


def _by_teachers(store: Store, images: np.ndarray) -> dict[str, np.ndarray]:
    """Teacher -> maps `[n, g, g]` of what it looks at, by its stored graph."""
    maps = {}
    for manifest in store.targets().values():
        tap, name = manifest.identity.tap, manifest.teacher
        if tap in ("activations", "attention"):
            graph, output = manifest.graph_output
            values = manifest.codec.exact(open_session(store.graph(name, graph), "cpu").run(images)[output])
            drawn = [cell(manifest, store.teacher_of(manifest), value).values for value in values]
            maps[f"teacher {name},\n{tap}"] = np.stack(drawn)
    return maps


def _by_student(model: nn.Module, about: StudentDescription, images: np.ndarray) -> np.ndarray:
    """Maps `[n, g, g]` of the class query's attention in a student's last layer."""
    attention = attention_layers(model, about.img_size)
    taps = AttentionTaps(attention.layers[-1:])
    with torch.no_grad(), taps:
        model(normalize(torch.from_numpy(images), about.mean, about.std))
    query = slice(attention.class_query, attention.class_query + 1)
    rows = taps.attention[0].rows(query).mean((1, 2))[:, len(attention.prefix) :].numpy()
    side = math.isqrt(rows.shape[1])
    return rows.reshape(-1, side, side)
