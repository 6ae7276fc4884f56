"""`pipeline evaluate linear-probe`."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.commands.evaluate import options
from pipeline.console import show
from pipeline.options import checkpoint, common, device
from pipeline.project.context import reads
from pipeline.run_paths import student_file


@click.command()
@options.run
@options.labeled_shards
@options.frozen_features
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Chooses the labeled samples; starts the probe.",
)
@click.option(
    "--lr", type=click.FloatRange(0, min_open=True), metavar="R", help="Learning rate.  [default: best on held-out]"
)
@checkpoint
@device
@reads(shards="val", train_shards="shards")
@common
def linear_probe(
    *,
    run: Path,
    shards: tuple[str, ...],
    train_shards: tuple[str, ...],
    label_fraction: float,
    listing: Path | None,
    projector_layers: int,
    seed: int,
    lr: float | None,
    checkpoint: str,
    device: str,
    as_json: bool,
) -> None:
    """Fit a linear classifier on frozen features.

    Without --lr, held-out training samples choose the learning rate. A training image that is also evaluated is
    skipped.

    \b
    pipeline evaluate linear-probe run --shards train-val-000000.tar --train-shards 'train-{000000..000009}.tar'
    pipeline evaluate linear-probe run --shards train-val-000000.tar --train-shards 'train-{000000..000009}.tar' \\
      --label-fraction 10% --list labeled.csv
    """
    from pipeline.evaluation.frozen import LabelFraction, measure_linear_probe

    labels = LabelFraction(shards=train_shards, fraction=label_fraction, seed=seed, listing=listing)
    path = student_file(run, checkpoint)
    report = measure_linear_probe(path, shards, labels, lr=lr, projector_layers=projector_layers, device=device)
    show(report.to_json(), report.lines(), as_json)
