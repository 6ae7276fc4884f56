"""`pipeline evaluate accuracy`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from pipeline.commands.evaluate import options
from pipeline.options import Words, copied_store, shards
from pipeline.project.context import reads

if TYPE_CHECKING:
    from pathlib import Path


def _bounds(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    low, _, high = (part.strip() for part in value.partition(","))
    if not (low.isdecimal() and high.isdecimal() and int(low) <= int(high)):
        raise click.BadParameter(f"{value!r}: expected LOW,HIGH, such as 20,100", ctx, param)
    return int(low), int(high)


@click.command()
@options.runs
@shards("--shards", help="Labeled shards; NAME=SHARDS is a named set with its own results.")
@click.option("--ensemble", is_flag=True, help="Also evaluate the mean of the probabilities of all RUNs.")
@click.option(
    "--shot-bounds",
    metavar="LOW,HIGH",
    callback=_bounds,
    help="Report classes with more than HIGH, LOW to HIGH, and fewer than LOW training images; usually 20,100.",
)
@shards("--train-shards", help="Count the training images for --shot-bounds in these shards.", required=False)
@copied_store
@reads(shards="val", store="store")
@options.prints_report
def accuracy(
    paths: list[Path], *, ensemble: bool, shot_bounds: tuple[int, int] | None, train_shards: Words, **settings: Any
) -> options.Report:
    """Measure top-1 and top-5 accuracy.

    Every sample counts once, on the evaluation view of the augmentation policy that the student was trained with.

    \b
    pipeline evaluate accuracy run --shards train-val-000000.tar
    pipeline evaluate accuracy run --shards train-val-000000.tar --shards seen=train-000000.tar --shot-bounds 20,100
    pipeline evaluate accuracy run vit_tiny-photos.safetensors --ensemble --shards train-val-000000.tar
    """
    if ensemble and len(paths) < 2:
        raise click.UsageError("--ensemble needs two RUNs or more: pipeline evaluate accuracy RUN1 RUN2 --ensemble …")
    if train_shards and shot_bounds is None:
        raise click.UsageError("--train-shards counts training images for --shot-bounds LOW,HIGH; 20,100 is usual")
    from pipeline.evaluation.accuracy import measure_accuracy

    return measure_accuracy(paths, ensemble=ensemble, shot_bounds=shot_bounds, train_shards=train_shards, **settings)
