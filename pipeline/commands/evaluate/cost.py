"""`pipeline evaluate cost`."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.commands.evaluate import options
from pipeline.console import show
from pipeline.options import checkpoint, common, device
from pipeline.run_paths import student_file


@click.command()
@options.runs
@click.option(
    "--teacher",
    "teachers",
    multiple=True,
    metavar="NAME",
    help="Also measure this teacher: a short name or a timm name; may be repeated.",
)
@click.option(
    "--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Images in a timed forward pass."
)
@checkpoint
@device
@common
def cost(
    *,
    runs: tuple[Path, ...],
    teachers: tuple[str, ...],
    batch_size: int,
    checkpoint: str,
    device: str,
    as_json: bool,
) -> None:
    """Measure parameters, multiply-adds and forward times.

    Links that AAL trained beside a student are measured too.

    \b
    pipeline evaluate cost run --teacher mobilenetv2
    """
    from pipeline.evaluation.cost import measure_cost

    paths = [student_file(run, checkpoint) for run in runs]
    report = measure_cost(paths, teachers, batch_size=batch_size, device=device)
    show(report.to_json(), report.lines(), as_json)
