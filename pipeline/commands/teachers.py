"""`pipeline teachers`: lists teachers, or shows the targets of one."""

from __future__ import annotations

import click

from pipeline.console import show
from pipeline.options import common


@click.command()
@click.argument("name", required=False)
@click.option("--input-size", type=click.IntRange(8, 4096), metavar="N", help="Side of the teacher's input.")
@click.option("--grid", type=click.IntRange(1), help="Grid of a CNN's activation maps.  [default: 14]")
@common
def teachers(name: str | None, input_size: int | None, grid: int | None, as_json: bool) -> None:
    """List teachers by short name, or show the targets of one.

    NAME can also be any timm name or a model.onnx. The sizes of the targets are shown, too. Nothing is downloaded:
    sizes depend on the network only, not on its weights.

    \b
    pipeline teachers
    pipeline teachers effnet_b3 --grid 14
    pipeline teachers model.onnx
    """
    from precompute import capabilities
    from precompute.teachers import onnx_file
    from precompute.teachers.teacher import SHORT_NAMES

    is_graph = name is not None and onnx_file.is_onnx_file(name)
    if (name is None or is_graph) and (grid or input_size):
        flag = "--grid" if grid else "--input-size"
        why = "a model.onnx has its own sizes" if is_graph else "give a teacher's NAME too"
        raise click.UsageError(f"{flag} is for one teacher that is a network of timm: {why}")
    if name is None:
        width = max(map(len, SHORT_NAMES))
        about = {short: {"model": model, "input_size": size} for short, (model, size) in SHORT_NAMES.items()}
        lines = [f"{short:{width}}  {model} at {size}" for short, (model, size) in SHORT_NAMES.items()]
        lines.append("any other timm name also serves; what one gives and takes: pipeline teachers NAME")
        show({"teachers": about}, lines, as_json)
        return
    from pipeline.inspection import teacher

    if is_graph:
        graph = capabilities.onnx_offers_of(name)
        show(graph, teacher.graph_lines(graph), as_json)
        return
    offers = capabilities.offers_of(name, input_size, grid or 14)
    show(offers, teacher.lines(offers), as_json)
