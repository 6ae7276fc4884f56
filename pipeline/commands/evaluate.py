"""The command `evaluate`: what it takes, and which protocol takes what."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from pipeline.console import show
from pipeline.options import common, shards
from pipeline.project.context import reads
from pipeline.run_paths import student_file

if TYPE_CHECKING:
    from student.evaluation.localization.max_box_acc import Convention
    from student.evaluation.similarity.compare import Tokens

# Options that not every protocol takes: a flag that would do nothing is refused.
_TAKEN_BY = {
    "--shards": ("accuracy", "knn", "probe", "boxes", "similarity"),
    "--ensemble": ("accuracy",),
    "--bounds": ("accuracy",),
    "--train-shards": ("accuracy", "knn", "probe"),
    "--labels": ("knn", "probe"),
    "--list": ("knn", "probe"),
    "--seed": ("knn", "probe"),
    "--lr": ("probe",),
    "--projected": ("knn", "probe"),
    "--box": ("boxes",),
    "--out": ("boxes", "similarity"),
    "--teacher": ("similarity", "cost"),
    "--target": ("similarity",),
    "--tokens": ("similarity",),
    "--batch-size": ("cost",),
    "--store": ("accuracy", "similarity"),
}


def _bounds(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    low, _, high = (part.strip() for part in value.partition(","))
    if not (low.isdecimal() and high.isdecimal() and int(low) <= int(high)):
        raise click.BadParameter(f"{value!r}: expected LOW,HIGH, such as 20,100", ctx, param)
    return int(low), int(high)


@click.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@shards("--shards", help="Labelled shards; NAME=SHARDS are a set of their own.", required=False)
@click.option("--protocol", type=click.Choice(["accuracy", "knn", "probe", "boxes", "similarity", "cost"]),
              default="accuracy", show_default=True, help="What is asked of the student.")  # fmt: skip
@click.option("--ensemble", is_flag=True, help="All RUNs together too: the mean of their probabilities.")
@shards("--train-shards", help="What knn and probe learn from; for --bounds, where images are counted.", required=False)
@click.option("--bounds", metavar="LOW,HIGH", callback=_bounds,
              help="Accuracy of classes with more than HIGH, LOW to HIGH, and fewer than LOW training images; 20,100 "
              "are usual.")  # fmt: skip
@click.option("--labels", metavar="PART", help="A class-balanced part of the training samples, such as 1%.")
@click.option("--list", "listing", type=click.Path(path_type=Path), metavar="F",
              help="Write down which samples had labels: a CSV with shard, key and label.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of this part, and of the probe.")
@click.option("--lr", type=click.FloatRange(0, min_open=True), metavar="R", help="The probe's only learning rate.")
@click.option("--projected", type=click.IntRange(0), default=0, metavar="N", show_default=True,
              help="Read features after N linear maps of the projector that the student was trained with.")  # fmt: skip
@click.option("--box", "convention", type=click.Choice(["official", "exact"]), default="official", show_default=True,
              help="Whether predicted boxes end one pixel late, as in the benchmark's code.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE",
              help="A picture (.png, .svg, .pdf): images with maps and boxes, or similarity by layers.")  # fmt: skip
@click.option("--teacher", "teachers", multiple=True, metavar="NAME",
              help="Tell the cost of this teacher too: a short name or a timm name; may be repeated. Of similarity: "
              "the one in the store.")  # fmt: skip
@click.option("--target", "targets", multiple=True, metavar="ID",
              help="The attention or tokens to compare with, of several; may be repeated.")  # fmt: skip
@click.option("--tokens", type=click.Choice(["all", "class", "mean"]), default="all", show_default=True,
              help="Which tokens of an image are compared: all, the class token, or the mean of patches.")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True,
              help="Images that a forward pass is timed with.")  # fmt: skip
@click.option("--checkpoint", type=click.Choice(["last", "best", "ema"]), default="last", show_default=True,
              help="Which student; `best` was chosen on the validation shards, `ema` is the average.")  # fmt: skip
@click.option("--store", metavar="DIR", help="Where the teacher of similarity is; of a student that copies "
              "attention, where its teacher is, if not where it was.")  # fmt: skip
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@reads(shards="val", train_shards="shards", store="store")
@common
def evaluate(
    runs: tuple[Path, ...],
    shards: tuple[str, ...],
    protocol: str,
    ensemble: bool,
    train_shards: tuple[str, ...],
    bounds: tuple[int, int] | None,
    labels: str | None,
    listing: Path | None,
    seed: int,
    lr: float | None,
    projected: int,
    convention: Convention,
    out: Path | None,
    teachers: tuple[str, ...],
    targets: tuple[str, ...],
    tokens: Tokens,
    batch_size: int,
    checkpoint: str,
    store: str | None,
    device: str,
    as_json: bool,
) -> None:
    """How good the students of runs are.

    Every sample counts once, on the evaluation view of the policy that the student was trained under. A file that
    `fit-teacher` wrote may stand for a run. What each protocol does: docs/evaluation.md.

    \b
    pipeline evaluate run --shards train-val-000000.tar
    pipeline evaluate run --shards train-val-000000.tar --shards seen=train-000000.tar --bounds 20,100
    pipeline evaluate run vit_tiny-photos.safetensors --ensemble --shards train-val-000000.tar
    pipeline evaluate run --protocol knn --shards train-val-000000.tar --train-shards 'train-{000000..000009}.tar'
    pipeline evaluate run --protocol probe --shards train-val-000000.tar --train-shards 'train-{000000..000009}.tar' \\
      --labels 10% --list labelled.csv
    pipeline evaluate run --protocol cost --teacher mobilenetv2
    """
    _require_fitting(protocol, runs, shards)
    from pipeline.evaluation import accuracy, frozen
    from student.evaluation.frozen.label_subset import share_of

    paths = [student_file(run, checkpoint) for run in runs]
    if protocol == "accuracy":
        counted = train_shards if _said("--train-shards") else ()  # else the run's record tells
        result, lines = accuracy.accuracy(paths, shards, ensemble, bounds, counted, store, device)
    elif protocol == "cost":
        from pipeline.evaluation.cost import costs

        result, lines = costs(paths, teachers, batch_size, device)
    elif protocol == "boxes":
        from pipeline.evaluation.localization import localize

        result, lines = localize(paths[0], shards, convention, out, device)
    elif protocol == "similarity":
        from pipeline.evaluation.similarity import similarity

        if store is None or len(teachers) > 1:
            raise click.UsageError(
                "--protocol similarity is with one teacher in a store: give --store DIR --teacher NAME"
            )
        result, lines = similarity(
            paths, shards, store, teachers[0] if teachers else None, targets, tokens, out, device
        )
    else:
        if not train_shards:
            raise click.UsageError(f"--protocol {protocol} learns from labelled images: give --train-shards SHARDS")
        part = frozen.LabelFraction(train_shards, share_of(labels) if labels else 1.0, seed, listing)
        if protocol == "knn":
            result, lines = frozen.knn(paths[0], shards, part, projected, device)
        else:
            result, lines = frozen.probe(paths[0], shards, part, projected, lr, device)
    show(result, lines, as_json)


def _option(flag: str) -> click.Parameter:
    (option,) = (param for param in click.get_current_context().command.params if flag in param.opts)
    return option


def _said(flag: str) -> bool:
    """Whether an option was given on the command line."""
    return click.get_current_context().get_parameter_source(str(_option(flag).name)) == ParameterSource.COMMANDLINE


def _require_fitting(protocol: str, runs: tuple[Path, ...], shards: tuple[str, ...]) -> None:
    """Refuse options that a protocol does not take, and a protocol without shards. Raises click.UsageError."""
    for flag, takers in _TAKEN_BY.items():
        if _said(flag) and protocol not in takers:
            raise click.UsageError(f"{flag} is for --protocol {' or '.join(takers)}, not for {protocol}; leave it out")
    if not shards and protocol in _TAKEN_BY["--shards"]:
        raise click.MissingParameter(ctx=click.get_current_context(), param=_option("--shards"))
    if protocol not in ("accuracy", "similarity", "cost") and len(runs) > 1:
        raise click.UsageError(f"--protocol {protocol} takes one RUN, found {len(runs)}")
    if _said("--ensemble") and len(runs) < 2:
        raise click.UsageError("--ensemble is of two RUNs or more: pipeline evaluate RUN1 RUN2 --ensemble …")
    if protocol == "accuracy" and _said("--train-shards") and not _said("--bounds"):
        raise click.UsageError("--train-shards counts the images of classes for --bounds LOW,HIGH; 20,100 are usual")
