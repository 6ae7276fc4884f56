"""`pipeline evaluate similarity`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from pipeline.commands.evaluate import options
from pipeline.options import choice, option, picture, shards, store
from pipeline.project.context import reads

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@options.runs
@shards("--shards", help="Shards to compare on; labels are not read.")
@store
@click.option("--teacher", metavar="NAME", help="The teacher to compare with, if the store has several.")
@option("--target", "ID", "Stored attention or tokens to compare with; repeatable.", "targets", multiple=True)
@choice(
    "--tokens",
    values=["all", "class", "mean"],
    text="Tokens to compare: all, the class token, or the mean of the patches.",
)
@picture()
@reads(shards="val", store="store")
@options.prints_report
def similarity(paths: list[Path], **settings: Any) -> options.Report:
    """Compare students with a stored teacher, layer by layer.

    Attention is compared by Jensen-Shannon divergence, tokens by linear CKA. The store must have the teacher's
    attention or tokens for these images in the evaluation view.

    \b
    pipeline evaluate similarity run --shards train-val-000000.tar --store S
    """
    from pipeline.evaluation.similarity import measure_similarity

    return measure_similarity(paths, **settings)
