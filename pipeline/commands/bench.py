"""`pipeline bench`: speed compared with the limits of this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pipeline.console import Console, show
from pipeline.options import PATH, Words, choice, common, option, shards

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(["precompute", "torch", "train", "live", "stream"]),
    help="Run only this benchmark; may be repeated.  [default: all]",
)
@shards("--shards", help="Photographs for `precompute` and `torch`: the first 512 of the first shard.", required=False)
@choice("--device", values=["auto", "cpu", "cuda"], text="Device of the models.")
@option("--turns", None, "Turns per variant; a live teacher runs two.", type=click.IntRange(1), default=5)
@click.option("--quick", is_flag=True, help="Run only small cases.")
@option(
    "--folder", "DIR", "Folder for temporary stores; its disk is measured, too.  [default: the system's]", type=PATH
)
@common
def bench(
    *, only: Words, shards: Words, device: str, turns: int, quick: bool, folder: Path | None, as_json: bool
) -> None:
    """Compare speed with the limits of this machine.

    Compares precompute with the CPU limit and with PyTorch, training steps with steps on labels only and with a live
    teacher, and reading with decoding and memory maps. Takes ten to twenty minutes; variants run in alternating turns.

    \b
    pipeline bench --only train --quick
    """
    from pipeline.bench import PARTS, lines
    from pipeline.bench import bench as run

    result = run(only or PARTS, shards, Console(), device=device, turns=turns, quick=quick, folder=folder)
    show(result, lines(result), as_json)
