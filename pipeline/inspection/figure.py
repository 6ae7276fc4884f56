"""The picture of one sample: its image with the stored crops, each view below it, and each target of that view."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np

from pipeline.inspection.cells import TOP, Cell, cell, meaning
from pipeline.inspection.sample import SeenView, StoredSample, shown_box, view_words
from pipeline.plotting import COLORS, FONT, GRAY, MAP, figure, limits, panel, shortened, write

# Inches.
LEFT, SIDE, GAP, MARGIN = 3.1, 2.2, 0.22, 0.25
BARS, CURVE = 1.4, 1.0  # heights of cells that are no maps
LINE = FONT / 72 * 1.25
NOTE = 0.24  # above each cell
LETTERS = 32  # of FONT that go over SIDE
LETTERS_LEFT = 44  # over LEFT
LARGEST = 1200  # pixels of the original's longer side that are drawn
# Where on its box each view's number stands, across and down: views of one box would hide each other's.
PLACES = ((0, 0), (1, 0), (1, 1), (0, 1), (0.5, 0), (0.5, 1))
MIDDLE = (5, 95)  # percentiles of a map where its colors end: a few tokens often take most of an attention


def picture(sample: StoredSample) -> Any:
    """A matplotlib figure: a column a view, below its view image a row a target."""
    heads = [_wrapped(_words(seen), LETTERS) for seen in sample.views]
    width = 2 * MARGIN + LEFT + len(heads) * (SIDE + GAP)
    title = _wrapped(_title(sample), int((LETTERS_LEFT - 4) * (width - 2 * MARGIN) / LEFT))
    head = MARGIN + (len(title) + 1) * LINE
    top = head + (1.4 + max(map(len, heads))) * LINE  # of the view images
    rows = [_Row(sample, id) for id in sample.targets]
    drawn = figure(width, top + SIDE + GAP + sum(row.height for row in rows) + MARGIN)
    write(drawn, MARGIN, MARGIN, title[0], weight="bold", fontsize=FONT + 2)
    write(drawn, MARGIN, MARGIN + 1.2 * LINE, "\n".join(title[1:]), color=GRAY)
    _original(drawn, sample, head, top + SIDE - head)
    for n, (seen, words) in enumerate(zip(sample.views, heads, strict=True)):
        write(drawn, _left(n), head, f"view {seen.number}", weight="bold", color=COLORS[n])
        write(drawn, _left(n), head + LINE, "\n".join(words))
        axes = _bare_panel(drawn, _left(n), top)
        axes.imshow(seen.image)
        for spine in axes.spines.values():
            spine.set(color=COLORS[n], linewidth=3)
    top += SIDE + GAP
    for row in rows:
        row.draw(drawn, top)
        top += row.height
    return drawn


def _left(n: int) -> float:
    """Where the column of the n-th view begins."""
    return MARGIN + LEFT + GAP + n * (SIDE + GAP)


def _title(sample: StoredSample) -> list[str]:
    name = f" ({shortened(sample.name, 40)})" if sample.name else ""
    label = "no label" if sample.label is None else f"label {sample.label}{name}"
    size = f"{sample.original.width}×{sample.original.height} pixels"
    more = sample.stored - len(sample.views)
    count = f"views 0 to {len(sample.views) - 1}; {more} more are stored" if more else f"all {sample.stored} view(s)"
    low, high = MIDDLE
    return [
        shortened(sample.key, 60),
        f"{label}, {size}, shard {shortened(sample.shard, 60)}",
        f"bank {sample.bank}: {sample.policy.line}; {count}",
        f"maps: dark is low, bright is high; colors end at the {low}th and {high}th percentile, ranges are whole",
    ]


def _words(seen: SeenView) -> list[str]:
    return [shortened(words, 60) for words in view_words(seen)] or ["nothing but the crop"]


def _wrapped(lines: list[str], letters: int) -> list[str]:
    return [part for line in lines for part in textwrap.wrap(line, letters) or [""]]


def _bare_panel(drawn: Any, left: float, top: float, width: float = SIDE, height: float = SIDE) -> Any:
    axes = panel(drawn, left, top, width, height)
    axes.set(xticks=[], yticks=[])
    return axes


def _original(drawn: Any, sample: StoredSample, top: float, most: float) -> None:
    """The original, as it is, with the part that each view shows."""
    from matplotlib.patheffects import withStroke

    image = sample.original
    width, height = image.size
    scale = min(LEFT / width, most / height)
    axes = _bare_panel(drawn, MARGIN, top, width * scale, height * scale)
    small = image.copy()
    small.thumbnail((LARGEST, LARGEST))
    axes.imshow(np.asarray(small), extent=(0, width, height, 0), aspect="auto")
    for n, seen in enumerate(sample.views):
        left, upper, right, lower = shown_box(seen.view, sample.policy.size)
        edge = [withStroke(linewidth=4, foreground="white")]
        corners = [left, right, right, left, left], [upper, upper, lower, lower, upper]
        axes.plot(*corners, color=COLORS[n], linewidth=2, path_effects=edge, clip_on=False)
        across, down = PLACES[n]
        x, y = left + across * (right - left), upper + down * (lower - upper)
        place = {"ha": ("left", "center", "right")[int(2 * across)], "va": ("top", "bottom")[down]}
        box = {"facecolor": COLORS[n], "edgecolor": "none", "pad": 2}
        axes.text(x, y, str(seen.number), color="white", fontsize=FONT, weight="bold", bbox=box, **place)
    axes.set(xlim=(0, width), ylim=(height, 0))


class _Row:
    """One target in all views, with its name on the left."""

    def __init__(self, sample: StoredSample, id: str) -> None:
        self.views, target, teacher = sample.views, sample.targets[id], sample.teachers[id]
        self.name = shortened(f"{target.teacher}: {target.identity.tap}", LETTERS_LEFT - 6)
        self.about = _wrapped([meaning(target, teacher)], LETTERS_LEFT - 6)
        sides = f" at {target.sides}" if target.sides else ""
        self.format = f"{'×'.join(map(str, target.sample_shape))}, kept as {target.identity.codec}{sides}"
        self.cells = {s.number: cell(target, teacher, s.values[id]) for s in sample.views if id in s.values}
        first = next(iter(self.cells.values()))
        self.cell_height = BARS if first.classes else SIDE if first.values.ndim == 2 else CURVE
        self.height = self.cell_height + NOTE + GAP

    def draw(self, drawn: Any, top: float) -> None:
        """Draw it from a height on."""
        top += NOTE
        write(drawn, MARGIN, top, self.name, weight="bold")
        write(drawn, MARGIN, top + LINE, "\n".join(self.about))
        write(drawn, MARGIN, top + (1.3 + len(self.about)) * LINE, self.format, color=GRAY)
        for n, seen in enumerate(self.views):
            if seen.number not in self.cells:
                write(drawn, _left(n), top, "not stored for this view", color=GRAY)
                continue
            shown = self.cells[seen.number]
            write(drawn, _left(n), top - NOTE, shown.note, fontsize=FONT - 1.5, color=GRAY)
            axes = _bare_panel(drawn, _left(n), top, height=self.cell_height)
            if shown.values.ndim == 2:
                _map(axes, seen.image, shown.values)
            elif shown.classes:
                _bars(axes, shown)
            else:
                _curve(axes, shown.values)


def _map(axes: Any, image: np.ndarray, values: np.ndarray) -> None:
    """A map `[g, g]` over the pale gray of its view image."""
    axes.imshow(image @ np.array([0.299, 0.587, 0.114]), cmap="gray", vmin=-140, vmax=255)
    (low, high), end = limits(*np.percentile(values, MIDDLE)), len(image) - 0.5
    over = {"cmap": MAP, "alpha": 0.6, "extent": (-0.5, end, end, -0.5), "interpolation": "nearest"}
    axes.imshow(values, vmin=low, vmax=high, **over)


def _bars(axes: Any, bars: Cell) -> None:
    axes.barh(range(len(bars.classes)), bars.values, color=COLORS[5], height=0.8)
    axes.set(xlim=(0, 1), ylim=(TOP - 0.5, -0.5))
    for place, (name, share) in enumerate(zip(bars.classes, bars.values, strict=True)):
        text = f"{shortened(name, 22)}  {100 * share:.1f} %"
        axes.text(0.03, place, text, va="center", fontsize=FONT - 0.5, parse_math=False)


def _curve(axes: Any, values: np.ndarray) -> None:
    axes.axhline(0, color=GRAY, linewidth=0.7)
    axes.plot(values, color=COLORS[1], linewidth=0.7)
    axes.set_xlim(0, max(len(values) - 1, 1))
