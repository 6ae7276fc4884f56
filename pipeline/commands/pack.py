"""`pipeline pack`."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from pipeline.console import Console, show
from pipeline.options import QUOTES, Hinted, Words, common, option
from pipeline.project.context import FILE, load


@click.command()
@click.argument(
    "places",
    nargs=-1,
    required=True,
    metavar="SOURCE... [OUT]",
    type=Hinted("Give a source and the new shards' names: pipeline pack photos train-000000.tar"),
)
@click.option("--per-shard", type=click.IntRange(1), help="Samples per shard.  [default: spread over all names]")
@option(
    "--val-fraction",
    "F",
    "Validation fraction of each class.  [default: 0; without OUT 0.1, if pipeline.yaml names `val`]",
    type=float,
)
@click.option("--fraction", type=float, default=1.0, help="Fraction of each class to keep.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the order and of both fractions.")
@click.option("--no-shuffle", is_flag=True, help="Keep the order of the source.")
@common
def pack(
    *,
    places: Words,
    per_shard: int | None,
    val_fraction: float | None,
    fraction: float,
    seed: int,
    no_shuffle: bool,
    as_json: bool,
) -> None:
    """Write shards from a folder of images, a CSV or other shards.

    SOURCE is a folder with one folder of images per class, a CSV with the columns path and label, or shards (also
    compressed). Without two class folders, or without the column label, the shards have no labels. OUT names the new
    shards; without it, the names come from pipeline.yaml.

    \b
    pipeline pack photos 'train-{000000..000009}.tar' --val-fraction 0.1
    pipeline pack list.csv 'listed/train-{000000..000009}.tar'
    pipeline pack 'train-{000000..000009}.tar' 'tenth/train-000000.tar' --fraction 0.1
    """
    from storage.shards.pack import pack as run

    sources, out = list(places[:-1]), places[-1]
    if len(sources) > 1 and any(Path(source).is_dir() or source.lower().endswith(".csv") for source in sources):
        raise click.UsageError(f"a folder or a CSV is packed alone, into shards of one name. {QUOTES}")
    if not sources:
        sources, (out, held) = [out], _shards_of_project(out)
        val_fraction = held if val_fraction is None else val_fraction
    result = run(
        sources,
        out,
        per_shard=per_shard,
        val_fraction=val_fraction or 0.0,
        fraction=fraction,
        seed=seed,
        shuffle=not no_shuffle,
        say=Console().say,
    )
    shards = {"train": result.train, "val": result.val}
    counts = [f"{count} samples in {len(shards[part])} {part} shard(s)" for part, count in result.samples.items()]
    show(result, [", ".join(counts), *result.train, *result.val], as_json)


def _shards_of_project(source: str) -> tuple[str, float]:
    """The single shard pattern in the project file of this folder, and the fraction for its validation shards."""
    path = Path(FILE)
    project = load(path) if path.is_file() else None
    patterns = project.said("shards") if project else None
    if not project or not patterns or len(patterns) != 1:
        raise click.UsageError(
            f"name the new shards, such as: pipeline pack {shlex.quote(source)} 'train-{{000000..000009}}.tar'"
            + (f"; {path} has no single pattern for them" if path.is_file() else "")
        )
    return str(patterns[0]), 0.1 if project.said("val") else 0.0
