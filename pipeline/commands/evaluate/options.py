"""Options that the commands of `pipeline evaluate` share."""

from __future__ import annotations

import functools
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import click

from pipeline.console import show
from pipeline.options import (
    PATH,
    TEACHER,
    TEACHER_SETTINGS,
    checkpoint,
    common,
    device,
    option,
    shards,
    teacher_settings,
    together,
    typed,
)
from pipeline.project import context
from pipeline.run_paths import student_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pipeline.evaluation.teacher import TeacherQuery


class Report(Protocol):
    """The result of a command."""

    def to_json(self) -> dict[str, Any]:
        """The result as plain data."""

    def lines(self) -> list[str]:
        """The result as lines to print."""


@runtime_checkable
class DrawnReport(Report, Protocol):
    """The result of a command that takes `--out`."""

    def picture(self) -> Any:
        """The result as a matplotlib figure."""


_OF_STUDENTS = ("checkpoint", "ensemble", "projector_layers")  # options that say nothing of a teacher
_OF_TEACHERS = (*TEACHER_SETTINGS, "view_policy", "view_size", "live")


def _listed(_context: click.Context, _param: click.Parameter, path: Path | None) -> tuple[Path, ...]:
    return () if path is None else (path,)


run = click.argument("runs", metavar="RUN", type=PATH, callback=_listed)
runs_or_teacher = click.argument("runs", metavar="[RUN...]", nargs=-1, type=PATH)
teacher_options = together(
    option("--teacher", "NAME", "Measure a teacher instead: its name in the store, a short name or a timm name."),
    *TEACHER,
    option("--view-policy", "P", "View of a teacher, without chance.  [default: eval, or as stored]"),
    option("--view-size", "N", "Side of a teacher's view.  [default: its input, or as stored]", type=click.IntRange(1)),
    click.option("--live", is_flag=True, help="Run the teacher even if the store has what it says."),
)
runs = click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=PATH)


def prints_report(measure: Callable[..., Report]) -> Callable[..., None]:
    """Add `--checkpoint`, `--device`, `--json` and `--debug`; pass on the student files, print and draw the report."""

    @functools.wraps(measure)
    def wrapped(
        *, runs: tuple[Path, ...], checkpoint: str, as_json: bool, out: Path | None = None, **settings: Any
    ) -> None:
        report = measure([student_file(run, checkpoint) for run in runs], **settings)
        result, lines = report.to_json(), report.lines()
        if out is not None and isinstance(report, DrawnReport):
            from pipeline.plotting import save

            save(report.picture(), out)
            result, lines = {**result, "files": [str(out)]}, [*lines, f"written: {out}"]
        show(result, lines, as_json)

    return together(checkpoint, device, common)(wrapped)


def measures_teachers(command: Callable[..., None], *, store_of_students: bool = True) -> Callable[..., None]:
    """Pass on what `teacher_options` say as `teacher`, a TeacherQuery; None where a student is measured.

    Args:
        command: from `prints_report`; it is called with the store, too.
        store_of_students: whether `--store` says something of students, too.
    """

    @functools.wraps(command)
    def wrapped(*, runs: tuple[Path, ...], teacher: str | None, **flags: Any) -> None:
        said = {name: flags.pop(name) for name in _OF_TEACHERS}
        of_teachers = (*_OF_TEACHERS, "same_classes", *(() if store_of_students else ("store",)))
        if teacher is None:
            if not runs:
                raise click.UsageError("Missing argument 'RUN': a student; or a teacher: --teacher NAME")
            if flag := typed(of_teachers):
                raise click.UsageError(f"{flag} is for teachers: add --teacher NAME")
        elif runs:
            raise click.UsageError(f"RUN ({runs[0]}) is a student, --teacher {teacher} a teacher; give one of them")
        elif flag := typed(_OF_STUDENTS):
            raise click.UsageError(f"{flag} is for students; leave it out with --teacher")
        command(runs=runs, teacher=teacher and _query(teacher, flags["store"], said), **flags)

    return wrapped


def _query(teacher: str, store: str | None, flags: dict[str, Any]) -> TeacherQuery:
    """Which teacher is measured, by the flags of `teacher_options`."""
    from pipeline.evaluation.teacher import TeacherQuery
    from pipeline.project.schema import TeacherEntry

    project = context.current()
    entry = (project.content.teachers if project else {}).get(teacher, TeacherEntry())
    return TeacherQuery(
        name=teacher,
        model=entry.teacher or teacher,
        settings=teacher_settings(entry, flags),
        said=typed(TEACHER_SETTINGS) is not None,
        store=store,
        store_may_be_missing=typed(["store"]) is None,
        **{name: flags[name] for name in ("view_policy", "view_size", "live")},
    )


def fraction(text: str) -> float:
    """The fraction in (0, 1] that `1%`, `10 %` or `0.01` means. Raises click.BadParameter."""
    number, percent, rest = text.strip().partition("%")
    try:
        value = float(number) / (100 if percent else 1)
    except ValueError:
        value = 0.0
    if rest.strip() or not 0 < value <= 1:
        raise click.BadParameter(f"{text!r}: expected a fraction of the training samples, such as 1% or 0.1")
    return value


# Of k-NN and linear probes: a student, samples, the labeled fraction, the features to read; and teachers.
frozen_features = together(
    click.argument("runs", metavar="[RUN]", required=False, type=PATH, callback=_listed),
    shards("--shards", help="Labeled shards to evaluate on.", labels=True),
    shards("--train-shards", help="Labeled training shards.", labels=True),
    option(
        "--label-fraction",
        "PART",
        "Use only this class-balanced fraction of the training samples, such as 1%.",
        type=fraction,
        default="100%",
    ),
    option(
        "--list",
        "FILE",
        "Write the selected training samples to a CSV with shard, key and label.",
        "listing",
        type=PATH,
    ),
    option(
        "--projector-layers",
        "N",
        "Read features after N linear layers of the projector that the student was trained with.",
        type=click.IntRange(0),
        default=0,
    ),
    option("--seed", None, "Seed of the label fraction and of the linear probe.", type=click.IntRange(0), default=0),
    teacher_options,
    option("--store", "DIR", "The store with a teacher's features."),
)


def prints_frozen_report(measure: Callable[..., Report]) -> Callable[..., None]:
    """Print the report of `measure`, which gets a student file or a TeacherQuery, a FrozenConfig, and the rest."""

    @functools.wraps(measure)
    def wrapped(paths: list[Path], *, teacher: TeacherQuery | None, store: str | None, **settings: Any) -> Report:  # noqa: ARG001 - the teacher has it
        from pipeline.evaluation.frozen import FrozenConfig

        config = FrozenConfig(**{field.name: settings.pop(field.name) for field in fields(FrozenConfig)})
        return measure(paths[0] if teacher is None else teacher, config, **settings)

    return measures_teachers(prints_report(wrapped), store_of_students=False)
