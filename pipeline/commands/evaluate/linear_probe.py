"""`pipeline evaluate linear-probe`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pipeline.commands.evaluate import options
from pipeline.options import POSITIVE, option
from pipeline.project.context import reads

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.evaluation.frozen import FrozenConfig
    from pipeline.evaluation.teacher import TeacherQuery


@click.command()
@options.frozen_features
@option("--lr", "R", "Learning rate.  [default: best on held-out]", type=POSITIVE)
@reads(shards="val", train_shards="shards", store="store")
@options.prints_frozen_report
def linear_probe(network: Path | TeacherQuery, config: FrozenConfig, lr: float | None) -> options.Report:
    """Fit a linear classifier on frozen features.

    With --teacher, stored features are read if the store has them for all images in a view without chance. Otherwise
    the teacher runs live, and DINO's features are read, as for students.

    Without --lr, the learning rate is selected on held-out training samples. A training image that is also evaluated is
    skipped.

    \b
    pipeline evaluate linear-probe run --shards train-val-000000.tar --train-shards 'train-{000000..000009}.tar'
    pipeline evaluate linear-probe run --shards train-val-000000.tar --train-shards 'train-{000000..000009}.tar' \\
      --label-fraction 10% --list labeled.csv
    """
    from pipeline.evaluation.frozen import measure_linear_probe

    return measure_linear_probe(network, config, lr)
