"""`pipeline demo`."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.console import Console, show
from pipeline.options import PATH, common


@click.command()
@click.option("--out", type=PATH, default="demo-out", show_default=True, help="A new folder.")
@common
def demo(out: Path, as_json: bool) -> None:
    """The whole path on handwritten digits, offline.

    Pack, two teachers, precompute, twelve students, a table and two pictures.

    \b
    pipeline demo --out demo-out
    """
    from pipeline.demo.run import demo as run

    console = Console()
    try:
        result = run(out, console)
    finally:
        console.stop()
    show(result, result["table"], as_json)
