"""`pipeline export`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pipeline.console import show
from pipeline.options import PATH, Words, checkpoint, common, missing, option, shards
from pipeline.project.context import reads
from pipeline.run_paths import student_file

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@click.argument("run", type=PATH)
@shards("--shards", help="Shards with images to check the graph on.", required=False)
@click.option("--out", type=PATH, metavar="F", help="File of the graph.  [default: RUN/student.onnx]")
@checkpoint
@option(
    "--push-to-hub", "USER/NAME", "Upload weights, config.json and model card to the Hugging Face Hub; writes no graph."
)
@click.option("--private", is_flag=True, help="Create a private repository on the Hub.")
@reads(shards=("val", "shards"))
@common
def export(
    run: Path,
    *,
    shards: Words,
    out: Path | None,
    checkpoint: str,
    push_to_hub: str | None,
    private: bool,
    as_json: bool,
) -> None:
    """Write a student as ONNX, or push it to the Hugging Face Hub.

    The graph takes uint8 images [B, S, S, 3] and returns logits [B, K], or features `embedding` [B, D] if the student
    has no classifier. It is checked on real images. Its metadata has class names, view size and evaluation view.

    timm loads the run folder directly with `timm.create_model("local-dir:run", pretrained=True)` (the student of the
    last epoch), and an uploaded student with `hf-hub:USER/NAME`.

    \b
    pipeline export run --shards train-val-000000.tar
    """
    if push_to_hub is not None:
        if out is not None:
            raise click.UsageError("--out is for a graph, and --push-to-hub writes none; give one of them")
        from pipeline.push_to_hub import push_to_hub as push

        result = push(student_file(run, checkpoint), push_to_hub, private=private)
        loaded = f'timm.create_model("hf-hub:{push_to_hub}", pretrained=True)'
        show(result, [f"{result['url']}: {sum(result['files'].values()):,} bytes; {loaded} loads it"], as_json)
        return
    if private:
        raise click.UsageError("--private is for a repository on the Hub; add --push-to-hub USER/NAME")
    if not shards:
        raise missing("shards")
    from pipeline.export_onnx import export as run_

    path = student_file(run, checkpoint)
    result = run_(path, shards, out or path.with_name("student.onnx"))
    show(result, [f"{result['graph']}: {result['bytes']:,} bytes, checked on {result['checked']} images"], as_json)
