"""`pipeline evaluate similarity`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.commands.evaluate import options
from pipeline.console import show
from pipeline.options import checkpoint, common, device, shards, store
from pipeline.project.context import reads
from pipeline.run_paths import student_file

if TYPE_CHECKING:
    from student.evaluation.similarity.compare import Tokens


@click.command()
@options.runs
@shards("--shards", help="Shards to compare on; labels are not read.")
@store
@click.option("--teacher", metavar="NAME", help="The teacher in the store, where it has several.")
@click.option(
    "--target", "targets", multiple=True, metavar="ID", help="Attention or tokens to compare with; may be repeated."
)
@click.option(
    "--tokens",
    type=click.Choice(["all", "class", "mean"]),
    default="all",
    show_default=True,
    help="Which tokens of an image are compared: all, the class token, or the mean of patches.",
)
@options.picture
@checkpoint
@device
@reads(shards="val", store="store")
@common
def similarity(
    *,
    runs: tuple[Path, ...],
    shards: tuple[str, ...],
    store: str,
    teacher: str | None,
    targets: tuple[str, ...],
    tokens: Tokens,
    out: Path | None,
    checkpoint: str,
    device: str,
    as_json: bool,
) -> None:
    """Compare students with a stored teacher, layer by layer.

    Attention is compared by Jensen-Shannon divergence, tokens by linear CKA. The teacher is what the store has of these
    images under the evaluation view.

    \b
    pipeline evaluate similarity run --shards train-val-000000.tar --store S
    """
    from pipeline.evaluation.similarity import measure_similarity

    report = measure_similarity(
        [student_file(run, checkpoint) for run in runs],
        shards,
        store,
        teacher=teacher,
        targets=targets,
        tokens=tokens,
        out=out,
        device=device,
    )
    show(report.to_json(), report.lines(), as_json)
