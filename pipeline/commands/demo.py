"""`pipeline demo`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pipeline.console import Console, show
from pipeline.options import PATH, common

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@click.option("--out", type=PATH, default="demo-out", show_default=True, help="A new folder.")
@common
def demo(out: Path, as_json: bool) -> None:
    """Run all steps on handwritten digits, offline.

    Packs images, trains two teachers, runs precompute, trains twelve students, and writes a table and two pictures.

    \b
    pipeline demo --out demo-out
    """
    from pipeline.demo.run import demo as run

    with Console() as console:
        result = run(out, console)
    show(result, result["table"], as_json)
