"""`pipeline bench`: speed against its limits on this machine."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.console import Console, show
from pipeline.options import PATH, choice, common, shards


@click.command()
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(["precompute", "torch", "train", "live", "stream"]),
    help="What is measured; may be repeated.  [default: all]",
)
@shards("--shards", help="Photographs for `precompute` and `torch`: the first 512 of the first shard.", required=False)
@choice("--device", values=["auto", "cpu", "cuda"], text="Where models run.")
@click.option(
    "--turns", type=click.IntRange(1), default=5, show_default=True, help="Of each contender; a live teacher takes two."
)
@click.option("--quick", is_flag=True, help="Small cases alone.")
@click.option(
    "--folder",
    type=PATH,
    metavar="DIR",
    help="Where temporary stores are made: its disk is measured too.  [default: the system's]",
)
@common
def bench(
    *,
    only: tuple[str, ...],
    shards: tuple[str, ...],
    device: str,
    turns: int,
    quick: bool,
    folder: Path | None,
    as_json: bool,
) -> None:
    """Measure speed against its physical limits.

    Precompute against what the cores allow and against PyTorch, training steps against steps with labels alone and
    with a live teacher, reading against decoding and memory maps. Ten to twenty minutes; contenders take turns.

    \b
    pipeline bench --only train --quick
    """
    from pipeline.bench import PARTS, lines
    from pipeline.bench import bench as run

    console = Console()
    result = run(only or PARTS, shards, console, device=device, turns=turns, quick=quick, folder=folder)
    show(result, lines(result), as_json)
