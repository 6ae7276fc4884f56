"""`pipeline teachers`: lists teachers, or shows the targets of some."""

from __future__ import annotations

import click

from pipeline.console import show
from pipeline.options import OUTSIDE_TIMM, Words, common, together, typed


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME…]")
@click.option("--input-size", type=click.IntRange(8, 4096), metavar="N", help="Side of the teacher's input.")
@click.option("--grid", type=click.IntRange(1), help="Grid of the activation maps.  [default: 14]")
@together(*OUTSIDE_TIMM)
@common
def teachers(
    *,
    names: Words,
    input_size: int | None,
    grid: int | None,
    prefix: Words | None,
    tap_modules: Words,
    as_json: bool,
) -> None:
    """List teachers by short name, or show the targets of some.

    NAME can also be any timm name, hf-hub:USER/NAME, local-dir:FOLDER, torchvision/NAME, a model.onnx, or a function
    that gives a network of your own: FILE.py:FUNCTION or MODULE:FUNCTION. Several names give one table, in Markdown.
    The sizes of the targets are shown, too. No weights are downloaded: sizes depend on the network only.

    \b
    pipeline teachers
    pipeline teachers effnet_b3 --grid 14
    pipeline teachers model.onnx
    pipeline teachers effnet_b3 vit_small_patch16_dinov3 swin_tiny_patch4_window7_224
    """
    from precompute import capabilities
    from precompute.teachers import onnx_file
    from storage.constants import SHORT_NAMES

    graphs = [name for name in names if onnx_file.is_onnx_file(name)]
    if (graphs or not names) and (flag := typed(("input_size", "grid"))):
        why = "a model.onnx has its own sizes" if graphs else "give a teacher's NAME too"
        raise click.UsageError(f"{flag} is for teachers that are networks of timm: {why}")
    if graphs and len(names) > 1:
        raise click.UsageError(f"{graphs[0]} cannot be in the table of networks: give it alone")
    if not names:
        width = max(map(len, SHORT_NAMES))
        about = {short: {"model": model, "input_size": size} for short, (model, size) in SHORT_NAMES.items()}
        lines = [f"{short:{width}}  {model} at {size}" for short, (model, size) in SHORT_NAMES.items()]
        lines.append("any other timm name works, too; its targets and their sizes: pipeline teachers NAME")
        show({"teachers": about}, lines, as_json)
        return
    from pipeline.inspection import teacher

    if graphs:
        graph = capabilities.onnx_offers_of(graphs[0])
        show(graph, teacher.graph_lines(graph), as_json)
        return
    offers = [
        capabilities.offers_of(name, input_size, grid or 14, prefix=prefix, tap_modules=tap_modules) for name in names
    ]
    if len(offers) == 1:
        show(offers[0], teacher.lines(offers[0]), as_json)
    else:
        show({"teachers": offers}, teacher.table(offers), as_json)
