"""`pipeline evaluate cost`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pipeline.commands.evaluate import options
from pipeline.options import Words, option

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@options.runs
@option(
    "--teacher",
    "NAME",
    "Also measure this teacher (short name or timm name); may be repeated.",
    "teachers",
    multiple=True,
)
@option("--batch-size", None, "Images in a timed forward pass.", type=click.IntRange(1), default=32)
@options.prints_report
def cost(paths: list[Path], *, teachers: Words, batch_size: int, device: str) -> options.Report:
    """Measure parameters, multiply-adds and forward times.

    Links that AAL trained together with a student are measured, too.

    \b
    pipeline evaluate cost run --teacher mobilenetv2
    """
    from pipeline.evaluation.cost import measure_cost

    return measure_cost(paths, teachers, batch_size=batch_size, device=device)
