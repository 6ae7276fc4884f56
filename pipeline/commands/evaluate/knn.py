"""`pipeline evaluate knn`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pipeline.commands.evaluate import options
from pipeline.project.context import reads

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.evaluation.frozen import FrozenConfig
    from pipeline.evaluation.teacher import TeacherQuery


@click.command()
@options.frozen_features
@reads(shards="val", train_shards="shards", store="store")
@options.prints_frozen_report
def knn(network: Path | TeacherQuery, config: FrozenConfig) -> options.Report:
    """Measure k-NN accuracy on frozen features.

    Neighbors are found among the features of the training shards. A training image that is also evaluated is skipped.

    With --teacher, stored features are read if the store has them for all images in a view without chance. Otherwise
    the teacher runs live.

    \b
    pipeline evaluate knn run --shards train-val-000000.tar --train-shards 'train-{000000..000009}.tar'
    pipeline evaluate knn --teacher vit_tiny --weights vit_tiny.safetensors --shards train-val-000000.tar \\
      --train-shards 'train-{000000..000009}.tar'
    """
    from pipeline.evaluation.frozen import measure_knn

    return measure_knn(network, config)
