"""Options that several commands of `pipeline evaluate` share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import click

from pipeline.options import shards

run = click.argument("run", type=click.Path(path_type=Path))
runs = click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
labeled_shards = shards("--shards", help="Labeled shards to evaluate on.")
picture = click.option(
    "--out", type=click.Path(path_type=Path), metavar="FILE", help="Also draw a picture: .png, .svg or .pdf."
)


def fraction(text: str) -> float:
    """The fraction in (0, 1] that `1%`, `10 %` or `0.01` means. Raises click.BadParameter."""
    number, percent, rest = text.strip().partition("%")
    try:
        value = float(number) / (100 if percent else 1)
    except ValueError:
        value = 0.0
    if rest.strip() or not 0 < value <= 1:
        raise click.BadParameter(f"{text!r}: expected a fraction of the training samples, such as 1% or 0.1")
    return value


def frozen_features(command: Callable[..., Any]) -> Callable[..., Any]:
    """What k-NN and linear probes take: training samples, how many of them are labeled, and which features are read."""

    @shards("--train-shards", help="Labeled shards to learn from.")
    @click.option(
        "--label-fraction",
        type=fraction,
        default="100%",
        metavar="PART",
        show_default=True,
        help="Use labels of this class-balanced fraction of the training samples, such as 1%.",
    )
    @click.option(
        "--list",
        "listing",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Write the samples whose labels are used: a CSV with shard, key and label.",
    )
    @click.option(
        "--projector-layers",
        type=click.IntRange(0),
        default=0,
        metavar="N",
        show_default=True,
        help="Read features after N linear layers of the projector that the student was trained with.",
    )
    @functools.wraps(command)
    def wrapped(**kwargs: Any) -> Any:
        return command(**kwargs)

    return cast(Callable[..., Any], wrapped)
