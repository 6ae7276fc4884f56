"""Recipes: YAML files with a header that says paper, command and what to expect; `--set` changes single settings.

Each of ours has a small variant, NAME-small: over it lies what pipeline/small.yaml says for all of them, and then its
own section `small`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipeline.console import Console
from pipeline.yaml_io import read_yaml, value_in
from storage.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from student.recipe.schema import Recipe

FOLDER = Path(__file__).parent
COMMON = FOLDER.parent / "small.yaml"
SMALL = "-small"
_INSTEAD = {"student.like": "model", "student.model": "like"}  # of two settings the one that is laid over counts
_SHORT = {"bank": "id", "links": "run"}  # settings with a short form -> what it says of them; of weights it is `start`


@dataclass(frozen=True, slots=True, kw_only=True)
class Over:
    """Settings that are laid over every recipe: `path.to.field` and value, and the file that says so."""

    where: str
    settings: Sequence[tuple[str, Any]]


def names() -> list[str]:
    """The recipes that come along."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def _file(recipe: str) -> Path:
    """A recipe's file; of a small variant that of the recipe."""
    name = recipe.removesuffix(SMALL)
    path = FOLDER / f"{name}.yaml" if name in names() else Path(recipe)
    if path.suffix in (".yaml", ".yml") and not path.is_file():
        raise UserError(f"{path}: no such recipe file; `pipeline recipes aal > {path}` creates one to start from")
    if not path.is_file():
        raise UserError(f"no recipe is called {recipe!r}. {did_you_mean(recipe, names())} A YAML file works, too.")
    return path


def text(recipe: str) -> str:
    """A recipe with its header, as a file that serves as one. Raises UserError: no such recipe."""
    path = _file(recipe)
    content = path.read_text(encoding="utf-8")
    if path.parent != FOLDER:
        return content
    if not recipe.endswith(SMALL):
        return content.partition("\nsmall:")[0].rstrip() + "\n"
    header = f"{_header(content)}#\n{_header(COMMON.read_text(encoding='utf-8'))}"
    return header + yaml.safe_dump(_content(recipe), sort_keys=False)


def _header(content: str) -> str:
    """The comments that a file begins with."""
    return "".join(takewhile(lambda line: line.startswith("#"), content.splitlines(keepends=True)))


def summary(recipe: str) -> str:
    """The first sentence of a recipe's header, without its name."""
    return text(recipe).partition("\n")[0].removeprefix(f"# {recipe}: ")


def _content(recipe: str) -> Any:
    """What a recipe's file says, or its small variant."""
    path = _file(recipe)
    content = read_yaml(path)
    if path.parent != FOLDER:
        return content
    own = content.pop("small", {})
    if recipe.endswith(SMALL):
        for section, settings in (*read_yaml(COMMON).items(), *own.items()):
            put(content, section, settings)
    return content


def load_recipe(recipe: str, settings: Sequence[str] = (), over: Over | None = None) -> Recipe:
    """A recipe by name or by file.

    Args:
        recipe: a name, such as `aal` or `aal-small`, or a YAML file.
        settings: `path.to.field=value`, as `--set` takes them, laid over the recipe and a project's settings.
        over: a project's settings, laid over the recipe.

    Raises:
        UserError: no such recipe, YAML that is none, an unknown field or a value that it does not take.
    """
    content = _content(recipe)
    from student.recipe.validate import validate

    where = f"recipe {recipe}"
    if not isinstance(content, dict):
        return validate(content, where)
    stages = [(where, copy.deepcopy(content))]
    said: dict[str, Any] = {}  # by the user, over the recipe
    project = (f"{where} with {over.where} laid over it", over.settings) if over else (where, ())
    for laid_over, pairs in (project, (f"{where} with --set", [_setting(text) for text in settings])):
        for name, value in pairs:
            put(content, name, value)
            put(said, name, value)
        stages.append((laid_over, copy.deepcopy(content)))
    _leave_out_sizes(content, said)
    try:
        return validate(content, where)
    except UserError:
        for where, stage in stages:  # the first that is wrong is to blame
            validate(stage, where)
        raise


def _leave_out_sizes(content: dict[str, Any], said: dict[str, Any]) -> None:
    """Leave out the sizes of a recipe's student that another network, named over the recipe, does not take."""
    named, student = said.get("student"), content.get("student")
    if not isinstance(named, dict) or not isinstance(student, dict):
        return
    name = named.get("like") or named.get("model")
    if not isinstance(name, str):
        return
    from student.models.build import not_taken

    if left_out := not_taken(name, {n: value for n, value in student.items() if n not in named}):
        Console().say(f"student {name} does not take what the recipe says of {', '.join(left_out)}: left out")
        student.update(dict.fromkeys(left_out))


def put(content: dict[str, Any], path: str, value: Any) -> None:
    """Set `path.to.field` of a recipe; what is absent on the way is made.

    A mapping for a section (`optim`, `losses.aal`) is laid over what is there, setting by setting; values that are
    mappings themselves (a weight's schedule, a bank) are replaced.
    """
    from student.recipe.schema import Recipe
    from student.recipe.validate import section_of

    *parents, last = path.split(".")
    parent = content
    for part in parents:
        below = parent.get(part)
        if not isinstance(below, dict):  # absent, or a short form such as `weight: 2000`
            below = parent[part] = {} if below is None else {_SHORT.get(part, "start"): below}
        parent = below
    if path in _INSTEAD and value is not None:
        parent.pop(_INSTEAD[path], None)
    section = parents == ["losses"] or (not parents and (last == "losses" or section_of(Recipe, last)))
    if not (section and isinstance(value, Mapping)):
        parent[last] = dict(value) if isinstance(value, Mapping) else value
        return
    if not isinstance(parent.get(last), dict):
        parent[last] = {}
    for name, setting in value.items():
        put(content, f"{path}.{name}", setting)


def _setting(setting: str) -> tuple[str, Any]:
    """Path and value of what `--set` takes."""
    path, equals, text = setting.partition("=")
    if not equals or not path:
        raise UserError(f"--set {setting}: expected NAME=VALUE, such as --set optim.epochs=50")
    from student.settings import number_in

    return path, number_in(value_in(text, f"--set {setting}"))
