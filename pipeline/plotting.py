"""What all pictures share: sizes in inches, colors that color-blind people can tell apart, files that are whole.

Matplotlib's Figure is used directly: no pyplot, no backend or style of the process is touched.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from storage.errors import UserError
from storage.objects.atomic import atomic_write
from storage.rounding import constant

if TYPE_CHECKING:
    from pathlib import Path

# Okabe and Ito's colors (without black and the pale yellow), for lines and bars; perceptual maps for values.
COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MAP = "viridis"
GRAY = "#555555"
FONT = 10.5  # points; at half size it can still be read
DPI = 160

_STARTS = {".png": (b"\x89PNG",), ".pdf": (b"%PDF",), ".svg": (b"<?xml", b"<svg")}


def picture_path(out: Path) -> Path:
    """A place where a picture may be written; one that is there is written over.

    Raises:
        UserError: matplotlib is not installed, the name is no picture's, there is no such folder, or something else
            than a picture is there.
    """
    starts = _STARTS.get(out.suffix.lower())
    if starts is None:
        raise UserError(f"{out}: a picture's name ends in {', '.join(_STARTS)}")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out}: the folder {out.parent} does not exist; create it first")
    if out.exists():
        if not out.is_file():
            raise UserError(f"{out}: this is not a regular file; give another name")
        with out.open("rb") as file:
            head = file.read(512)
        wrong = not head.startswith(starts) or (out.suffix.lower() == ".svg" and b"<svg" not in head)
        if head and wrong:
            raise UserError(f"{out}: this file exists and is not a picture; give another name, or remove it")
    try:
        import matplotlib as _  # noqa: F401
    except ImportError:
        raise UserError("pictures need matplotlib: pip install -c constraints.txt -e '.[cpu,demo]'") from None
    return out


def figure(width: float, height: float) -> Any:
    """An empty white figure of so many inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, facecolor="white")


def panel(figure: Any, left: float, top: float, width: float, height: float) -> Any:
    """Axes at a place in inches from the figure's top left corner."""
    whole_width, whole_height = figure.get_size_inches()
    bottom = whole_height - top - height
    axes = figure.add_axes((left / whole_width, bottom / whole_height, width / whole_width, height / whole_height))
    axes.tick_params(labelsize=FONT - 2, colors=GRAY)
    for spine in axes.spines.values():
        spine.set_color(GRAY)
    return axes


def write(figure: Any, left: float, top: float, text: str, **how: Any) -> Any:
    """Text with its top left corner at a place in inches. Never read as mathematics: it may hold anybody's names."""
    width, height = figure.get_size_inches()
    look = {"fontsize": FONT, "va": "top", "ha": "left", "linespacing": 1.25, **how}
    return figure.text(left / width, 1 - top / height, text, parse_math=False, **look)


def limits(low: float, high: float) -> tuple[float, float]:
    """Where the colors of a map between these begin and end: one and the same where its values differ by rounding."""
    return (low, low) if constant(low, high) else (low, high)


def shortened(text: str, most: int) -> str:
    """A name on one line: what cannot be printed as `?`, the middle of a long one left out."""
    plain = "".join(c if c.isprintable() else "?" for c in text)
    if len(plain) <= most:
        return plain
    head = (most - 1) // 2
    return f"{plain[:head]}…{plain[len(plain) - (most - 1 - head) :]}"


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG, SVG or PDF by its name's ending, whole or not at all."""
    with atomic_write(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in a script that the font has not: boxes
        figure.savefig(temporary, format=path.suffix.lower().lstrip("."))
