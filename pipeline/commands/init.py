"""`pipeline init`."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import click

from pipeline.console import Console, show
from pipeline.options import PATH, common

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@click.argument("folder", type=PATH)
@click.option("--out", type=PATH, default="pipeline.yaml", show_default=True, help="Project file.")
@common
def init(folder: Path, out: Path, as_json: bool) -> None:
    """Write a project file for a folder of shards or images.

    Inspects the shards or images. Images are in one folder per class; without two class folders, they have no labels,
    and the project file is for a student that learns from a teacher alone. Asks no questions.

    \b
    pipeline init photos
    """
    from pipeline.project.init import init as run

    with Console() as console:
        result = run(folder, out, console)
    count = f"{len(result['classes'])} classes" if result["classes"] else "classes without names"
    count = count if result["labeled"] else "no labels"
    images = f"{'about ' if result['estimated'] else ''}{result['images']:,} images"
    held = ", ".join([*map(shlex.quote, result["val"][:3]), *["…"] * (len(result["val"]) > 3)])
    lines = [
        f"{result['project']}: {images}, {count}, about {result['side']} pixels",
        f"for validation: {held or 'none'} ({result['val_because']}). Next:",
        *(f"  {command}" for command in result["commands"]),
    ]
    if later := result["with_labels"]:
        lines += ["Once you have labels, here as class folders in `labeled`, measure the student and fine-tune it:"]
        lines += [f"  {command}" for command in later]
    show(result, lines, as_json)
