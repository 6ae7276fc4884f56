"""What a project file may say, validated; relative paths in it made into paths from here."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from precompute.teachers.onnx_file import is_onnx_file
from storage.errors import UserError
from storage.objects.network_names import is_own
from storage.objects.urls import is_remote, separate
from storage.objects.weights_file import is_random
from student.recipe.schema import Recipe
from student.recipe.validate import section_of, sentence, suggested
from student.settings import StudentConfig, number_in

_LOCAL = "local-dir:"  # opens the names of networks in a folder that timm wrote


def weights_located(name: str, folder: Path) -> str:
    """The absolute path of a file that a project file in a folder names: stores record it."""
    return str(Path(located(name, folder)).expanduser().absolute()) if name and not is_random(name) else name


def teacher_located(name: str, folder: Path) -> str:
    """A teacher's name; of a file or a function of the user's, with the path from here."""
    if is_onnx_file(name):
        return weights_located(name, folder)
    if name.startswith(_LOCAL):
        return f"{_LOCAL}{weights_located(name.removeprefix(_LOCAL), folder)}"
    return function_located(name, folder)


def function_located(name: str, folder: Path) -> str:
    """A network's name; of a function of the user's file, with the file's path from here."""
    return located(name, folder) if is_own(name) and ".py:" in name else name


def located(pattern: str, folder: Path) -> str:
    """What a path, URL or pattern, or several joined by `::`, of a project file in a folder is called from here."""
    return "::".join(_part_located(part, folder) for part in separate(pattern))


def _part_located(part: str, folder: Path) -> str:
    if part.startswith("{") and "}" in part:  # what its braces stand for may be anything: {/a,b}/0.tar
        from storage.shards.patterns import braces

        each = braces(part)
        if any(map(_is_whole, each)):
            return "::".join(one if _is_whole(one) else str(folder / one) for one in each)
    return part if _is_whole(part) else str(folder / part)


def _is_whole(part: str) -> bool:
    return is_remote(part) or part.startswith(("/", "~", "file://"))


def _from_here(place: Callable[[str, Path], str]) -> AfterValidator:
    """Replaces a path by what `place` makes of it and the project file's folder."""
    return AfterValidator(lambda name, info: place(name, info.context))


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _listed(value: Any) -> Any:
    """One stands for a list of one."""
    return (value,) if isinstance(value, str | int | float) and not isinstance(value, bool) else value


def _nothing(value: Any) -> Any:
    """A key with nothing behind it is an empty mapping."""
    return {} if value is None else value


def _numbers(value: Any) -> Any:
    """Numbers that YAML takes for words, in a list or a mapping."""
    if isinstance(value, dict):
        return {name: number_in(one) for name, one in value.items()}
    return [number_in(one) for one in value] if isinstance(value, list | tuple) else value


Word = Annotated[str, StringConstraints(min_length=1)]
Words = Annotated[tuple[Word, ...], BeforeValidator(_listed)]
Numbers = Annotated[tuple[float, ...], BeforeValidator(_numbers), BeforeValidator(_listed)]
Name = Annotated[str, StringConstraints(pattern="^[A-Za-z0-9_-]{1,40}$")]
Place = Annotated[Word, _from_here(located)]
Shards = Annotated[tuple[Place, ...], BeforeValidator(_listed)]


class ViewSettings(_Section):
    """Which views are drawn: `--view-policy`, `--view-size`, `--num-views` and `--seed`."""

    policy: str | None = None
    size: int | None = Field(None, ge=1)
    count: int | None = Field(None, ge=1)
    seed: int | None = None


class TeacherEntry(_Section):
    """One teacher, called so in the store: what `precompute` takes about it. Without `teacher`, its name says that."""

    teacher: Annotated[str, _from_here(teacher_located)] | None = None
    weights: Annotated[str, _from_here(weights_located)] | None = None
    weights_key: str | None = None
    args: Annotated[dict[str, Any], BeforeValidator(_numbers)] = {}
    mean: Numbers | None = None
    std: Numbers | None = None
    input_size: int | None = Field(None, ge=1)
    prefix: str | None = None
    tap_modules: Words = ()
    targets: Words = ()
    tap_tensors: dict[str, Words] = {}


class ProjectSettings(_Section):
    """A whole project file."""

    shards: Shards | None = None
    val: Shards | None = None
    store: Place | None = None
    views: ViewSettings = ViewSettings()
    teachers: dict[Name, Annotated[TeacherEntry, BeforeValidator(_nothing)]] = {}
    student: StudentConfig | None = None
    set: dict[str, Any] = {}
    provider: Literal["auto", "cpu", "cuda"] | None = None
    workers: int | None = Field(None, ge=1)
    dask: str | None = None
    worker_timeout: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _one_cluster(self) -> ProjectSettings:
        if self.workers and self.dask:
            raise ValueError("workers starts processes here, dask joins others; give one of them")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Project:
    """A project file and what it says, with the paths of shards, store and teachers from the current folder."""

    path: Path
    content: ProjectSettings

    @property
    def settings(self) -> Sequence[tuple[str, Any]]:
        """`path.to.field` of a recipe and value, with paths from here, to be laid over every recipe in this order."""
        student, overrides = self.content.student, {name: number_in(value) for name, value in self.content.set.items()}
        own = student.model_dump(mode="json", include=student.model_fields_set) if student else {}
        if isinstance(section := overrides.get("student"), dict):  # as it stands there or setting by setting
            del overrides["student"]
            overrides = {f"student.{name}": value for name, value in section.items()} | overrides
        places = {"student.model": function_located, "student.weights": weights_located}
        return [
            (name, places[name](value, self.path.parent) if name in places and isinstance(value, str) else value)
            for name, value in (*((f"student.{name}", value) for name, value in own.items()), *overrides.items())
        ]

    def said(self, *fields: str) -> Any:
        """The first of some fields, by their names with dots, that the file says; None where it says none."""
        values = (functools.reduce(getattr, field.split("."), self.content) for field in fields)
        value: Any = next((value for value in values if value is not None), None)
        return list(value) if isinstance(value, tuple) else value


def validate(path: Path, content: Any) -> Project:
    """The project in parsed YAML.

    Raises:
        UserError: naming the file, and each wrong key with the nearest known one or what was expected.
    """
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping with {', '.join(ProjectSettings.model_fields)}")
    try:
        given = {name: value for name, value in content.items() if value is not None}
        settings = ProjectSettings.model_validate(given, context=path.parent)
    except ValidationError as error:
        raise UserError(f"{path}: " + "; ".join(_explain(problem) for problem in error.errors())) from None
    for name, value in settings.set.items():
        _require_known(f"{path}: set.", name, value)
    return Project(path=path, content=settings)


def _require_known(where: str, name: str, value: Any) -> None:
    """Refuse a setting that no recipe has; which ones a loss has is for the recipe to say."""
    section: Any = Recipe
    parts = name.split(".")
    for at, part in enumerate(parts):
        if section is not None and part not in section.model_fields:
            known = suggested(".".join(parts[: at + 1]), section, parts[at + 1 :])
            raise UserError(f"{where}{name}: a recipe has no {part!r} there. {known}")
        section = section_of(section, part) if section is not None and part != "losses" else None
    if section is not None and isinstance(value, Mapping):
        for below, content in value.items():
            _require_known(where, f"{name}.{below}", content)


def _explain(problem: Any) -> str:
    parts = [str(part) for part in problem["loc"] if part != "[key]"]
    section: Any = ProjectSettings
    for i, part in enumerate(parts[:-1]):
        section = TeacherEntry if parts[:i] == ["teachers"] else section and section_of(section, part)
    if problem["type"] == "extra_forbidden" and section is ProjectSettings and "." in suggested(parts[0], Recipe):
        return f"{parts[0]}: a recipe's setting goes under `set`. {suggested(parts[0], Recipe)}"
    such = "; right is teachers: {vit_tiny: {}}" if parts == ["teachers"] else ""
    return sentence(".".join(parts) or "the file", problem, section) + such
