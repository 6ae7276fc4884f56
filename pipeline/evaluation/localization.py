"""What `pipeline evaluate localize` measures: what attention finds, as plain data, as a table, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.console import Console
from pipeline.evaluation.common import Said, columns, only_set_of, opened, percent
from pipeline.plotting import COLOURS, FONT, GREY, MAP, figure, panel, picture_path, save, shortened, write
from storage.shards.index import cached_index
from student.distributed import pick_device
from student.evaluation.localization import localize as localization
from student.evaluation.localization.localize import ClassAttention, LocalizedImage
from student.evaluation.localization.max_box_acc import OVERLAPS, SIDE, Convention

# Inches.
CELL, GAP, MARGIN, HEAD, NOTE = 1.9, 0.25, 0.3, 0.95, 0.3
PAIRS = 2  # images in a row, each beside its map


def measure_localization(
    path: Path, patterns: Sequence[str], convention: Convention, *, out: Path | None, device: str
) -> Said:
    """MaxBoxAcc of one student, and a picture where a place for it is given."""
    file = picture_path(out) if out is not None else None
    urls = only_set_of(patterns)
    where, console = pick_device(device), Console()
    member, result = opened(path, where, console)
    looker = ClassAttention(member.model, member.name)
    console.start("localising", sum(len(cached_index(url)) for url in urls))
    try:
        told, shown = localization.localize(
            looker, member.about, urls, convention, device=where, shown=file is not None, advance=console.advance
        )
    finally:
        console.stop()
    result |= {"view": "resize", "maps": looker.text, "box": convention, **told}
    lines = _lines(result)
    if file is not None:
        save(picture(shown, result), file)
        result["files"] = [str(file)]
        lines.append(f"written: {file}")
    return result, lines


def _lines(result: dict[str, Any]) -> list[str]:
    names = {"v1": "largest contour (MaxBoxAcc)", "v2": "all contours (V2)", "centre": "centred box"}
    rows = [("right, %, at IoU", *map(str, OVERLAPS), *(f"[{several}]" for several in result["v1"]["means"]))]
    rows += [
        (text, *(percent(result[kind][str(overlap)]["accuracy"]) for overlap in OVERLAPS),
         *map(percent, result[kind]["means"].values()))
        for kind, text in names.items()
    ]  # fmt: skip
    without = f", {result['without_box']} without a box left out" if result["without_box"] else ""
    return [
        *columns(rows),
        f"{result['maps']}; {result['box']} boxes; each at the threshold, or the size, that is best for the whole set; "
        f"{result['samples']} images{without}",
    ]


def picture(shown: Sequence[LocalizedImage], result: dict[str, Any]) -> Any:
    """A matplotlib figure: images with true and predicted boxes, each beside its map."""
    rows = -(-len(shown) // PAIRS)
    width = 2 * MARGIN + PAIRS * (2 * CELL + GAP) + GAP + 0.7
    drawn = figure(width, HEAD + rows * (CELL + NOTE + GAP) - NOTE - GAP + MARGIN)
    level = result["v1"]["0.5"]["threshold"]
    write(drawn, MARGIN, MARGIN / 2, f"Where {shortened(result['student'], 60)} looks", weight="bold")
    write(drawn, MARGIN, MARGIN / 2 + 0.25, "true box", color=COLOURS[4], weight="bold")
    write(drawn, MARGIN + 1.0, MARGIN / 2 + 0.25, f"predicted (dashed): map above {level:g} of its maximum",
          color=COLOURS[1], weight="bold")  # fmt: skip
    image = None
    for n, one in enumerate(shown):
        left = MARGIN + (n % PAIRS) * (2 * CELL + 2 * GAP)
        top = HEAD + (n // PAIRS) * (CELL + NOTE + GAP)
        write(drawn, left, top - NOTE + 0.03, f"{shortened(one.image.key, 28)}, IoU {one.overlap:.2f}", color=GREY,
              fontsize=FONT - 1)  # fmt: skip
        for column in range(2):
            axes = panel(drawn, left + column * CELL, top, CELL - 0.05, CELL - 0.05)
            axes.set_xticks([])
            axes.set_yticks([])
            if column:
                image = axes.imshow(one.map / 255, cmap=MAP, vmin=0, vmax=1)
            else:
                axes.imshow(one.image.pixels, extent=(-0.5, SIDE - 0.5, SIDE - 0.5, -0.5))
            for box in one.image.boxes:
                _draw(axes, box, COLOURS[4], "-")
            _draw(axes, one.box, COLOURS[1], "--")
    bar = panel(drawn, width - MARGIN - 0.65, HEAD, 0.15, CELL - 0.05)
    drawn.colorbar(image, cax=bar).set_label("attention, of its maximum", color=GREY, fontsize=FONT - 1)
    return drawn


def _draw(axes: Any, box: Any, colour: str, style: str) -> None:
    """A box around its first and last pixels, on a white line that shows on any ground."""
    left, top, right, bottom = box
    corners = ([left, right, right, left, left], [top, top, bottom, bottom, top])
    axes.plot(*corners, color="white", linewidth=3.2, scalex=False, scaley=False)
    axes.plot(*corners, color=colour, linewidth=1.8, linestyle=style, scalex=False, scaley=False)
