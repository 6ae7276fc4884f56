"""`pipeline evaluate knn`."""

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
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Chooses the labeled samples.")
@checkpoint
@device
@reads(shards="val", train_shards="shards")
@common
def knn(
    *,
    run: Path,
    shards: tuple[str, ...],
    train_shards: tuple[str, ...],
    label_fraction: float,
    listing: Path | None,
    projector_layers: int,
    seed: int,
    checkpoint: str,
    device: str,
    as_json: bool,
) -> None:
    """Measure k-NN accuracy on frozen features.

    Neighbors are found among the features of the training shards. A training image that is also evaluated is skipped.

    \b
    pipeline evaluate knn run --shards train-val-000000.tar --train-shards 'train-{000000..000009}.tar'
    """
    from pipeline.evaluation.frozen import LabelFraction, measure_knn

    labels = LabelFraction(shards=train_shards, fraction=label_fraction, seed=seed, listing=listing)
    path = student_file(run, checkpoint)
    report = measure_knn(path, shards, labels, projector_layers=projector_layers, device=device)
    show(report.to_json(), report.lines(), as_json)
