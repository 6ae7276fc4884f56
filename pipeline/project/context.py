"""The project file: settings that all commands share, in `pipeline.yaml`. Flags override it.

`pipeline.yaml` in the current folder is taken unless `--project FILE` names another or `--no-project` none. Relative
paths in it are relative to its own folder. Unknown keys are refused with the nearest known one.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline.project.schema import Project
    from pipeline.recipes.loader import Over
    from student.settings import StudentConfig

FILE = "pipeline.yaml"
_META = "teacher-store project"


def reads(**options: str | tuple[str, ...]) -> Callable[..., Any]:
    """`--project` and `--no-project` for a command: option -> field of a project that says it where no flag does.

    Of several fields, the first that the file says.

    The options are filled from the file before click asks whether one is missing.
    """

    def choose(ctx: click.Context, _param: click.Parameter, value: str | bool | None) -> None:
        if ctx.resilient_parsing or value is False:
            return
        if value is not None and _META in ctx.meta:  # click calls first for the option that was given first
            raise click.UsageError("--project and --no-project are both given; choose one", ctx)
        if value is True:
            ctx.meta[_META] = None
        elif value is not None or (_META not in ctx.meta and Path(FILE).is_file()):
            _read(ctx, Path(value or FILE), options)

    text = f"A project file; {FILE} in this folder by default. Flags override it."
    option = functools.partial(click.option, is_eager=True, expose_value=False, callback=choose)
    project = option("--project", metavar="FILE", help=text)
    no_project = option("--no-project", is_flag=True, help="Ignore project files.")
    return lambda command: project(no_project(command))


def _read(ctx: click.Context, path: Path, options: dict[str, str | tuple[str, ...]]) -> None:
    """Read a project file for a command, and take what it says as the defaults of the command's options."""
    ctx.meta[_META] = project = load(path)
    said = {name: project.said(*([field] if isinstance(field, str) else field)) for name, field in options.items()}
    ctx.default_map = {name: value for name, value in said.items() if value is not None}
    if os.environ.get("RANK", "0") == "0":  # torchrun's other processes say the same
        print(f"project {path}", file=sys.stderr, flush=True)


def current() -> Project | None:
    """The project that the running command reads; None without one."""
    ctx = click.get_current_context(silent=True)
    return ctx.meta.get(_META) if ctx else None


def over() -> Over | None:
    """What the running command's project lays over every recipe, as the loader of recipes takes it; None without."""
    from pipeline.recipes.loader import Over

    project = current()
    return Over(where=str(project.path), settings=project.settings) if project else None


def grid() -> int | None:
    """Patches a side of the running command's project's student, where the file says sizes; else None."""
    project = current()
    student = project.content.student if project else None
    return student.img_size // student.patch_size if student and student.img_size and student.patch_size else None


def student() -> StudentConfig | None:
    """The running command's project's student, where the file names its network; else None."""
    from pipeline.recipes.loader import put
    from student.recipe.validate import validate

    content: dict[str, Any] = {"losses": {"crossentropy": {}}}
    project = current()
    for name, value in project.settings if project else ():
        if name.partition(".")[0] == "student":
            put(content, name, value)
    if not {"model", "like"} & content.get("student", {}).keys():
        return None
    return validate(content, str(project and project.path)).student


def load(path: Path) -> Project:
    """A validated project file. Raises UserError: file, key, and the nearest known key or what was expected."""
    from pipeline.project.schema import validate
    from pipeline.yaml_io import read_yaml
    from storage.errors import UserError

    if not path.exists():
        raise UserError(f"{path}: cannot be read: No such file or directory; one is made by pipeline init FOLDER")
    return validate(path, read_yaml(path))
