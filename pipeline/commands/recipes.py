"""`pipeline recipes`."""

from __future__ import annotations

import click

from pipeline.console import show
from pipeline.options import common


@click.command()
@click.argument("name", required=False)
@common
def recipes(name: str | None, as_json: bool) -> None:
    """List the built-in recipes, or show one in full.

    In full: paper, command, expected results, settings.

    \b
    pipeline recipes
    pipeline recipes aal
    """
    from pipeline.recipes import loader as known

    if name is None:
        about = {recipe: known.summary(recipe) for recipe in known.names()}
        width = max(map(len, about))
        lines = [f"{recipe:{width}}  {text}" for recipe, text in about.items()]
        lines.append("each has a small variant that trains in minutes: NAME-small, such as aal-small")
        lines.append("one recipe in full: pipeline recipes NAME; settings: docs/recipes.md")
        show({"recipes": about}, lines, as_json)
        return
    text = known.text(name)
    settings = known.load_recipe(name).model_dump(mode="json") if as_json else {}
    show({"recipe": name, "text": text, "settings": settings}, [text.rstrip()], as_json)
