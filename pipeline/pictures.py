"""How pictures are drawn: one style, readable at half size and by people who see colours otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
MARKERS = ("o", "s", "^", "D", "v", "P")


def figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    from matplotlib.figure import Figure

    return Figure((width, height), layout="constrained")


def write(made: Figure, out: Path) -> Path:
    """Write a figure; its file."""
    made.savefig(out, dpi=160)
    return out
