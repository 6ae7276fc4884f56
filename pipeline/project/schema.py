"""What a project file may say, validated; relative paths in it made into paths from here."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from precompute.teachers.onnx_file import is_onnx_file
from storage.errors import UserError
from storage.objects.network_names import is_own
from storage.objects.urls import is_remote, separate
from storage.objects.weights_file import is_random
from student.recipe.schema import Recipe
from student.recipe.validate import section_of, sentence, suggested
from student.settings import StudentConfig, number_in

_LOCAL = "local-dir:"  # opens the names of networks in a folder that timm wrote


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _listed(value: Any) -> Any:
    """One stands for a list of one."""
    return (value,) if isinstance(value, str | int | float) and not isinstance(value, bool) else value


def _nothing(value: Any) -> Any:
    """A key with nothing behind it is an empty mapping."""
    return {} if value is None else value


def _number(value: Any) -> Any:
    return [number_in(one) for one in value] if isinstance(value, list | tuple) else value


Words = Annotated[tuple[Annotated[str, StringConstraints(min_length=1)], ...], BeforeValidator(_listed)]
Numbers = Annotated[tuple[float, ...], BeforeValidator(_number), BeforeValidator(_listed)]
Name = Annotated[str, StringConstraints(pattern="^[A-Za-z0-9_-]{1,40}$")]


def _arguments(value: Any) -> Any:
    return {name: number_in(one) for name, one in value.items()} if isinstance(value, dict) else value


class ViewSettings(_Section):
    """Which views are drawn: `--view-policy`, `--view-size`, `--num-views` and `--seed`."""

    policy: str | None = None
    size: int | None = Field(None, ge=1)
    count: int | None = Field(None, ge=1)
    seed: int | None = None


class TeacherEntry(_Section):
    """One teacher, called so in the store: what `precompute` takes about it. Without `teacher`, its name says that."""

    teacher: str | None = None
    weights: str | None = None
    weights_key: str | None = None
    args: Annotated[dict[str, Any], BeforeValidator(_arguments)] = {}
    mean: Numbers | None = None
    std: Numbers | None = None
    input_size: int | None = Field(None, ge=1)
    prefix: str | None = None
    tap_modules: Words = ()
    targets: Words = ()
    tap_tensors: dict[str, Words] = {}


class ProjectSettings(_Section):
    """A whole project file."""

    shards: Words | None = None
    val: Words | None = None
    store: Annotated[str, StringConstraints(min_length=1)] | None = None
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
    """A project file and what it says, with paths from the current folder."""

    path: Path
    content: ProjectSettings

    @property
    def settings(self) -> Sequence[tuple[str, Any]]:
        """`path.to.field` of a recipe and value, to be laid over every recipe in this order."""
        student = self.content.student
        own = student.model_dump(mode="json", include=student.model_fields_set) if student else {}
        return [*((f"student.{name}", value) for name, value in own.items()), *self.content.set.items()]

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
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping with {', '.join(ProjectSettings.model_fields)}")
    try:
        settings = ProjectSettings.model_validate({k: v for k, v in content.items() if v is not None})
    except ValidationError as error:
        raise UserError(f"{path}: " + "; ".join(_explain(problem) for problem in error.errors())) from None
    for name, value in settings.set.items():
        _require_known(f"{path}: set.", name, value)
    return Project(path=path, content=_from_here(settings, path.parent))


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


def _from_here(settings: ProjectSettings, folder: Path) -> ProjectSettings:
    """The settings, with paths relative to the current folder instead of the file's."""

    def patterns(shards: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return shards and tuple(located(pattern, folder) for pattern in shards)

    def weights(name: str | None) -> str | None:  # recorded in the store, so from anywhere
        is_file = name and not is_random(name)
        return str(Path(located(str(name), folder)).expanduser().absolute()) if is_file else name

    def own(name: str) -> str:  # a function of the user's file
        return located(name, folder) if is_own(name) and ".py:" in name else name

    def files(entry: TeacherEntry) -> TeacherEntry:
        teacher = entry.teacher
        if teacher and is_onnx_file(teacher):
            teacher = weights(teacher)
        elif teacher and teacher.startswith(_LOCAL):
            teacher = f"{_LOCAL}{weights(teacher.removeprefix(_LOCAL))}"
        elif teacher:
            teacher = own(teacher)
        return entry.model_copy(update={"weights": weights(entry.weights), "teacher": teacher})

    student, overrides = settings.student, {name: number_in(value) for name, value in settings.set.items()}
    if isinstance(section := overrides.get("student"), dict):  # as it stands there or setting by setting
        del overrides["student"]
        overrides = {f"student.{name}": value for name, value in section.items()} | overrides
    if student and student.weights:
        student = student.model_copy(update={"weights": weights(student.weights)})
    if student and "model" in student.model_fields_set:
        student = student.model_copy(update={"model": own(student.model)})
    if isinstance(name := overrides.get("student.model"), str):
        overrides["student.model"] = own(name)
    if isinstance(path := overrides.get("student.weights"), str):
        overrides["student.weights"] = weights(path)
    return settings.model_copy(
        update={
            "shards": patterns(settings.shards),
            "val": patterns(settings.val),
            "store": settings.store and located(settings.store, folder),
            "teachers": {name: files(entry) for name, entry in settings.teachers.items()},
            "student": student,
            "set": overrides,
        }
    )


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
