"""`pipeline inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pipeline.console import show
from pipeline.options import common, picture, shards, store, typed
from pipeline.project.context import reads

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@store
@click.option("--sample", metavar="KEY", help="Draw the stored views and targets of this sample of --shards to --out.")
@shards("--shards", help="Shards that contain the sample.", required=False)
@picture("The picture: .png, .svg or .pdf.")
@reads(store="store", shards="shards")
@common
def inspect(store: str, sample: str | None, shards: tuple[str, ...], out: Path | None, as_json: bool) -> None:
    """Show the contents of a store, or draw a sample of it.

    Lists teachers, banks (stored views) and targets, how much of each is complete, and its size.

    With --sample, draws one sample: its image with the crops of its views (at most six), each view as the teachers see
    it, and each target on top of it.

    \b
    pipeline inspect --store S
    pipeline inspect --store S --shards 'train-{000000..000009}.tar' --sample cat_7 --out cat_7.png
    """
    from pipeline.inspection import store as inspection
    from storage.store.store import Store

    if sample is None and typed(("shards", "out")):
        raise click.UsageError("--shards and --out are for the picture of one sample: add --sample KEY, or omit both")
    if sample is None:
        contents = inspection.inspect(Store.open(store))
        show(contents.plain(), inspection.lines(contents), as_json)
        return
    if not shards or out is None:
        add = " and ".join(["--shards SHARDS"] * (not shards) + ["--out FILE.png"] * (out is None))
        raise click.UsageError(f"--sample {sample} is drawn from its shard into a picture: add {add}")
    from pipeline import plotting
    from pipeline.inspection import sample as samples
    from pipeline.inspection.figure import picture as drawn
    from storage.shards.patterns import expand

    stored = samples.stored_sample(Store.open(store), expand(shards), sample)
    plotting.save(drawn(stored), out)
    show({**samples.facts(stored), "files": [str(out)]}, [*samples.lines(stored), f"written: {out}"], as_json)
