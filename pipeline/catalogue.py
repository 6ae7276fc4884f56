"""Commands that show what there is to choose from: recipes, teachers."""

from __future__ import annotations

import click

from pipeline.console import show
from pipeline.options import common


@click.command()
@click.argument("name", required=False)
@common
def recipes(name: str | None, as_json: bool) -> None:
    """The recipes that come along, or one of them whole.

    Whole: paper, command, what to expect, settings.

    \b
    pipeline recipes
    pipeline recipes aal
    """
    from pipeline import recipes as known

    if name is None:
        about = {recipe: known.summary(recipe) for recipe in known.names()}
        width = max(map(len, about))
        lines = [f"{recipe:{width}}  {text}" for recipe, text in about.items()]
        lines.append("each has a small variant that trains in minutes: NAME-small, such as aal-small")
        lines.append("one of them whole: pipeline recipes NAME; settings: docs/recipes.md")
        show({"recipes": about}, lines, as_json)
        return
    text = known.text(name)
    settings = known.load(name).model_dump(mode="json") if as_json else {}
    show({"recipe": name, "text": text, "settings": settings}, [text.rstrip()], as_json)


@click.command()
@click.argument("name", required=False)
@click.option("--input-size", type=click.IntRange(8, 4096), metavar="N", help="Side of the teacher's input.")
@click.option("--grid", type=click.IntRange(1), help="Of a CNN's activation maps.  [default: 14]")
@common
def teachers(name: str | None, input_size: int | None, grid: int | None, as_json: bool) -> None:
    """Teachers by their short names, or what one can give.

    Any timm name serves, and a model.onnx; what its targets take is said too. Nothing is fetched: sizes are those of
    the network, whatever its weights.

    \b
    pipeline teachers
    pipeline teachers effnet_b3 --grid 14
    pipeline teachers model.onnx
    """
    from precompute import ready
    from precompute.teachers import SHORT

    is_graph = name is not None and ready.is_ready(name)
    if (name is None or is_graph) and (grid or input_size):
        flag = "--grid" if grid else "--input-size"
        why = "a model.onnx has its own sizes" if is_graph else "give a teacher's NAME too"
        raise click.UsageError(f"{flag} is for one teacher that is a network of timm: {why}")
    if name is None:
        width = max(map(len, SHORT))
        about = {short: {"model": model, "input_size": size} for short, (model, size) in SHORT.items()}
        lines = [f"{short:{width}}  {model} at {size}" for short, (model, size) in SHORT.items()]
        lines.append("any other timm name also serves; what one gives and takes: pipeline teachers NAME")
        show({"teachers": about}, lines, as_json)
        return
    from pipeline import offers

    if is_graph:
        graph = ready.offers_of(name)
        show(graph, offers.graph_lines(graph), as_json)
        return
    from precompute.offers import offers_of

    found = offers_of(name, input_size, grid or 14)
    show(found, offers.lines(found), as_json)
