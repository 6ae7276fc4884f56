"""`pipeline evaluate localize`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.commands.evaluate import options
from pipeline.console import show
from pipeline.options import checkpoint, common, device, shards
from pipeline.project.context import reads
from pipeline.run_paths import student_file

if TYPE_CHECKING:
    from student.evaluation.localization.max_box_acc import Convention


@click.command()
@options.run
@shards("--shards", help="Shards with a `bbox` in the json of their samples.")
@click.option(
    "--box",
    "convention",
    type=click.Choice(["official", "exact"]),
    default="official",
    show_default=True,
    help="Whether predicted boxes end one pixel late, as in the benchmark's code.",
)
@options.picture
@checkpoint
@device
@reads(shards="val")
@common
def localize(
    *,
    run: Path,
    shards: tuple[str, ...],
    convention: Convention,
    out: Path | None,
    checkpoint: str,
    device: str,
    as_json: bool,
) -> None:
    """Measure whether attention finds objects (MaxBoxAcc).

    The class token's attention predicts a box, which is compared with the true boxes. The picture shows images, their
    maps and both boxes.

    \b
    pipeline evaluate localize run --shards boxed-000000.tar --out boxes.png
    """
    from pipeline.evaluation.localization import measure_localization

    path = student_file(run, checkpoint)
    report = measure_localization(path, shards, convention, out=out, device=device)
    show(report.to_json(), report.lines(), as_json)
