"""Options that the commands of `pipeline evaluate` share."""

from __future__ import annotations

import functools
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Protocol

import click

from pipeline.console import show
from pipeline.options import PATH, checkpoint, common, device, option, shards, together
from pipeline.run_paths import student_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Report(Protocol):
    """The result of a command."""

    def to_json(self) -> dict[str, Any]:
        """The result as plain data."""

    def lines(self) -> list[str]:
        """The result as lines to print."""


run = click.argument("runs", metavar="RUN", type=PATH, callback=lambda _context, _param, value: (value,))
runs = click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=PATH)
labeled_shards = shards("--shards", help="Labeled shards to evaluate on.")


def prints_report(measure: Callable[..., Report]) -> Callable[..., None]:
    """Add `--checkpoint`, `--device`, `--json` and `--debug`; pass on the student files, and print the report."""

    @functools.wraps(measure)
    def wrapped(*, runs: tuple[Path, ...], checkpoint: str, as_json: bool, **settings: Any) -> None:
        report = measure([student_file(run, checkpoint) for run in runs], **settings)
        show(report.to_json(), report.lines(), as_json)

    return together(checkpoint, device, common)(wrapped)


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


# Of k-NN and linear probes: training samples, the labeled fraction, the features to read.
frozen_features = together(
    shards("--train-shards", help="Labeled training shards."),
    option(
        "--label-fraction",
        "PART",
        "Use only this class-balanced fraction of the training samples, such as 1%.",
        type=fraction,
        default="100%",
    ),
    click.option(
        "--list",
        "listing",
        type=PATH,
        metavar="FILE",
        help="Write the selected training samples to a CSV with shard, key and label.",
    ),
    option(
        "--projector-layers",
        "N",
        "Read features after N linear layers of the projector that the student was trained with.",
        type=click.IntRange(0),
        default=0,
    ),
    option("--seed", None, "Seed of the label fraction and of the linear probe.", type=click.IntRange(0), default=0),
)


def prints_frozen_report(measure: Callable[..., Report]) -> Callable[..., None]:
    """As `prints_report`; `measure` is called with the student file, a FrozenConfig, and the other options."""

    @functools.wraps(measure)
    def wrapped(paths: list[Path], **settings: Any) -> Report:
        from pipeline.evaluation.frozen import FrozenConfig

        config = FrozenConfig(**{field.name: settings.pop(field.name) for field in fields(FrozenConfig)})
        return measure(paths[0], config, **settings)

    return prints_report(wrapped)
