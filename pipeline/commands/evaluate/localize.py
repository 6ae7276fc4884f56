"""`pipeline evaluate localize`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pipeline.commands.evaluate import options
from pipeline.options import Words, choice, picture, shards
from pipeline.project.context import reads

if TYPE_CHECKING:
    from pathlib import Path

    from student.evaluation.localization.max_box_acc import Convention


@click.command()
@options.run
@shards("--shards", help="Shards whose samples have a `bbox` in their json.")
@choice(
    "--box",
    "convention",
    values=["official", "exact"],
    text="official: predicted boxes end one pixel late, as in the benchmark's code.",
)
@picture()
@reads(shards="val")
@options.prints_report
def localize(paths: list[Path], *, shards: Words, convention: Convention, device: str) -> options.Report:
    """Measure whether attention finds objects (MaxBoxAcc).

    A box is predicted from the attention of the class token and compared with the ground-truth boxes. The picture shows
    images, their maps and both boxes.

    \b
    pipeline evaluate localize run --shards boxed-000000.tar --out boxes.png
    """
    from pipeline.evaluation.localization import measure_localization

    return measure_localization(paths[0], shards=shards, convention=convention, device=device)
