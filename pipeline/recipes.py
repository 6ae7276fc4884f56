"""Recipes: YAML files with a header that says paper, command and what to expect; `--set` changes single settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from storage.errors import UserError, nearest

if TYPE_CHECKING:
    from student.config import Recipe

FOLDER = Path(__file__).parent / "recipes"


def names() -> list[str]:
    """The recipes that come along."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(recipe: str, settings: Sequence[str] = ()) -> Recipe:
    """A recipe by name or by file, with `path.to.field=value` settings laid over it.

    Raises:
        UserError: no such recipe, YAML that is none, an unknown field or a value that it does not take.
    """
    path = FOLDER / f"{recipe}.yaml" if recipe in names() else Path(recipe)
    if not path.is_file():
        raise UserError(
            f"no recipe is called {recipe!r}. {nearest(recipe, names())} A path to a YAML file also serves."
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not plain YAML: {' '.join(str(error).split())}") from None
    from student.config import validate

    if isinstance(content, dict):
        for setting in settings:
            _set(content, setting)

    return validate(content, f"recipe {recipe}")


def _set(content: Any, setting: str) -> None:
    path, equals, text = setting.partition("=")
    if not equals or not path:
        raise UserError(f"--set {setting}: expected path.to.field=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {setting}: the value is not plain YAML: {' '.join(str(error).split())}") from None
    if isinstance(value, str):
        value = _number(value)
    *parents, last = path.split(".")
    here = content
    for part in parents:
        below = here.get(part)
        if not isinstance(below, dict):  # absent, or a short form such as `weight: 2000`
            below = here[part] = {} if below is None else {"id" if part == "bank" else "start": below}
        here = below
    here[last] = value


def _number(text: str) -> Any:
    """YAML takes 5e-4 for a string; people mean the number."""
    try:
        return float(text)
    except ValueError:
        return text
