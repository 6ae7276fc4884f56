"""`pipeline evaluate accuracy`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from pipeline.commands.evaluate import options
from pipeline.options import missing, option, shards
from pipeline.project.context import reads

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.evaluation.teacher import TeacherQuery


def _bounds(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    low, _, high = (part.strip() for part in value.partition(","))
    if not (low.isdecimal() and high.isdecimal() and int(low) <= int(high)):
        raise click.BadParameter(f"{value!r}: expected LOW,HIGH, such as 20,100", ctx, param)
    return int(low), int(high)


@click.command()
@options.runs_or_teacher
@shards("--shards", help="Labeled shards; NAME=SHARDS is a named set with its own results.", labels=True)
@click.option("--ensemble", is_flag=True, help="Also evaluate the mean of the probabilities of all RUNs.")
@click.option(
    "--shot-bounds",
    metavar="LOW,HIGH",
    callback=_bounds,
    help="Report classes with more than HIGH, LOW to HIGH, and fewer than LOW training images; usually 20,100.",
)
@shards("--train-shards", help="Count the training images for --shot-bounds in these shards.", required=False)
@options.teacher_options
@click.option("--same-classes", is_flag=True, help="The labels are a teacher's classes, if a list is unknown.")
@option(
    "--store",
    "DIR",
    "The store with a teacher's logits, or with the teacher of a student that copies attention, if it was moved.",
)
@reads(shards="val", store="store")
@options.measures_teachers
@options.prints_report
def accuracy(
    paths: list[Path],
    *,
    teacher: TeacherQuery | None,
    same_classes: bool,
    store: str | None,
    ensemble: bool,
    **settings: Any,
) -> options.Report:
    """Measure top-1 and top-5 accuracy.

    Every sample counts once, on the evaluation view of the augmentation policy that the student was trained with. A
    teacher's stored logits are read if the store has them for all images in a view without chance. Otherwise it runs
    live on the view `eval` at its input size.

    \b
    pipeline evaluate accuracy run --shards train-val-000000.tar
    pipeline evaluate accuracy run --shards train-val-000000.tar --shards seen=train-000000.tar --shot-bounds 20,100
    pipeline evaluate accuracy run vit_tiny-photos.safetensors --ensemble --shards train-val-000000.tar
    pipeline evaluate accuracy --teacher vit_tiny --weights vit_tiny-photos.safetensors --teacher-arg num_classes=2 \\
      --shards train-val-000000.tar
    """
    if ensemble and len(paths) < 2 and teacher is None:
        raise click.UsageError("--ensemble needs two RUNs or more: pipeline evaluate accuracy RUN1 RUN2 --ensemble …")
    if settings["train_shards"] and settings["shot_bounds"] is None:
        raise click.UsageError("--train-shards counts training images for --shot-bounds LOW,HIGH; 20,100 is usual")
    if teacher is not None and settings["shot_bounds"] and not settings["train_shards"]:
        raise missing("train_shards")
    from pipeline.evaluation.accuracy import measure_accuracy, measure_teacher_accuracy

    if teacher is not None:
        return measure_teacher_accuracy(teacher, same_classes=same_classes, **settings)
    return measure_accuracy(paths, ensemble=ensemble, store=store, **settings)
