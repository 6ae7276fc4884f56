"""Options that the commands of `pipeline evaluate` share."""

from __future__ import annotations

import functools
import inspect
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Protocol

import click
from click.core import ParameterSource

from pipeline.console import show
from pipeline.options import (
    PATH,
    TEACHER,
    checkpoint,
    common,
    device,
    option,
    shards,
    teacher_settings,
    together,
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


_OF_STUDENTS = ("checkpoint", "ensemble", "projector_layers")  # options that say nothing of a teacher
_SETTINGS = ("weights", "weights_key", "teacher_arg", "mean", "std", "input_size", "prefix", "tap_module")
_OF_TEACHERS = (*_SETTINGS, "view_policy", "view_size", "live", "same_classes")

run = click.argument("runs", metavar="RUN", type=PATH, callback=lambda _context, _param, value: (value,))
# Of commands that measure teachers, too.
run_or_teacher = click.argument(
    "runs",
    metavar="[RUN]",
    required=False,
    type=PATH,
    callback=lambda _context, _param, value: () if value is None else (value,),
)
runs_or_teacher = click.argument("runs", metavar="[RUN...]", nargs=-1, type=PATH)
teacher_options = together(
    option("--teacher", "NAME", "Measure a teacher instead: its name in the store, a short name or a timm name."),
    *TEACHER,
    option("--view-policy", "P", "View of a teacher, without chance.  [default: eval, or as stored]"),
    option("--view-size", "N", "Side of a teacher's view.  [default: its input, or as stored]", type=click.IntRange(1)),
    click.option("--live", is_flag=True, help="Run the teacher even if the store has what it says."),
)
runs = click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=PATH)
labeled_shards = shards("--shards", help="Labeled shards to evaluate on.", labels=True)


def prints_report(measure: Callable[..., Report]) -> Callable[..., None]:
    """Add `--checkpoint`, `--device`, `--json` and `--debug`; pass on the student files, and print the report."""

    @functools.wraps(measure)
    def wrapped(*, runs: tuple[Path, ...], checkpoint: str, as_json: bool, **settings: Any) -> None:
        report = measure([student_file(run, checkpoint) for run in runs], **settings)
        show(report.to_json(), report.lines(), as_json)

    return together(checkpoint, device, common)(wrapped)


def measures_teachers(command: Callable[..., None]) -> Callable[..., None]:
    """Pass on what `teacher_options` say as `teacher`, a TeacherQuery; None where a student is measured.

    The command, from `prints_report`, is called with the store, too, where it takes one.
    """
    takes_store = "store" in inspect.signature(command).parameters

    @functools.wraps(command)
    def wrapped(*, runs: tuple[Path, ...], store: str | None, **flags: Any) -> None:
        names = ("teacher", *_SETTINGS, "view_policy", "view_size", "live")
        said = {name: flags.pop(name) for name in names}
        if takes_store:
            flags["store"] = store
        command(runs=runs, teacher=_query(runs, store, takes_store=takes_store, **said), **flags)

    return wrapped


def _query(
    runs: tuple[Path, ...],
    store: str | None,
    *,
    takes_store: bool,
    teacher: str | None,
    view_policy: str | None,
    view_size: int | None,
    live: bool,
    **flags: Any,
) -> TeacherQuery | None:
    """Which teacher is measured. Raises click.UsageError: a student is, too, or flags that are of the other."""
    sources = click.get_current_context().get_parameter_source
    if teacher is None:
        if not runs:
            raise click.UsageError("Missing argument 'RUN': a student; or a teacher: --teacher NAME")
        of_teachers = _OF_TEACHERS if takes_store else (*_OF_TEACHERS, "store")
        if name := next((name for name in of_teachers if sources(name) == ParameterSource.COMMANDLINE), None):
            raise click.UsageError(f"{_flag(name)} is of a teacher: add --teacher NAME")
        return None
    if runs:
        raise click.UsageError(f"RUN ({runs[0]}) is a student, --teacher {teacher} a teacher; give one of them")
    if name := next((name for name in _OF_STUDENTS if sources(name) == ParameterSource.COMMANDLINE), None):
        raise click.UsageError(f"{_flag(name)} is of students; leave it out with --teacher")
    from pipeline.evaluation.teacher import TeacherQuery

    project = context.current()
    entry = project.content.teachers.get(teacher) if project else None
    return TeacherQuery(
        name=teacher,
        model=entry.teacher or teacher if entry else teacher,
        settings=teacher_settings(entry, **flags),
        said=any(flags.values()),
        store=store,
        store_may_be_missing=sources("store") != ParameterSource.COMMANDLINE,
        view_policy=view_policy,
        view_size=view_size,
        live=live,
    )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


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


# Of k-NN and linear probes: training samples, the labeled fraction, the features to read; and teachers.
frozen_features = together(
    shards("--train-shards", help="Labeled training shards.", labels=True),
    option(
        "--label-fraction",
        "PART",
        "Use only this class-balanced fraction of the training samples, such as 1%.",
        type=fraction,
        default="100%",
    ),
    click.option(
        "--list",
        "listing",
        type=PATH,
        metavar="FILE",
        help="Write the selected training samples to a CSV with shard, key and label.",
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
    def wrapped(paths: list[Path], *, teacher: TeacherQuery | None, **settings: Any) -> Report:
        from pipeline.evaluation.frozen import FrozenConfig

        config = FrozenConfig(**{field.name: settings.pop(field.name) for field in fields(FrozenConfig)})
        return measure(paths[0] if teacher is None else teacher, config, **settings)

    return measures_teachers(prints_report(wrapped))
