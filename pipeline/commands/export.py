"""`pipeline export`."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.console import show
from pipeline.options import common, shards
from pipeline.project.context import reads
from pipeline.run_paths import student_file


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@shards("--shards", help="Shards with images that the graph is checked on.")
@click.option("--out", type=click.Path(path_type=Path), metavar="F", help="The graph.  [default: RUN/student.onnx]")
@click.option("--checkpoint", type=click.Choice(["last", "best", "ema"]), default="last", show_default=True,
              help="Which student.")  # fmt: skip
@reads(shards="val")
@common
def export(run: Path, shards: tuple[str, ...], out: Path | None, checkpoint: str, as_json: bool) -> None:
    """Write a run's student as an ONNX graph.

    From uint8 images [B, S, S, 3] to logits [B, K], checked on real images; to features, `embedding` [B, D], of a
    student without a classifier. Class names, view size and evaluation
    view are in its metadata.

    \b
    pipeline export run --shards train-val-000000.tar
    """
    from pipeline.export_onnx import export as run_

    path = student_file(run, checkpoint)
    result = run_(path, shards, out or path.with_name("student.onnx"))
    show(result, [f"{result['graph']}: {result['bytes']:,} bytes, checked on {result['checked']} images"], as_json)
