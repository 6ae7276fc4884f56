"""`pipeline verify`."""

from __future__ import annotations

from dataclasses import asdict

import click

from pipeline.console import Console, show
from pipeline.options import Words, common, network, option, shards, store
from pipeline.project.context import reads
from storage.errors import UserError

SHOWN = 10  # files of a list that are named; --json names all


@click.command()
@store
@shards("--shards", help="Shards to check views and targets against.", required=False)
@option("--samples", None, "Samples to check, evenly spaced.", type=click.IntRange(1), default=64)
@click.option("--full", is_flag=True, help="Check all samples.")
@click.option("--weights", multiple=True, metavar="F", help="A teacher's weights, if they were moved; may be repeated.")
@network
@reads(store="store", shards="shards")
@common
def verify(*, store: str, shards: Words, samples: int, full: bool, weights: Words, as_json: bool) -> None:
    """Check every byte of a store, its pixels and targets.

    With --shards, views are rendered again and compared, and targets are compared with the live PyTorch teacher if its
    weights are available, else with the stored graph; the code of a network that timm does not have runs only with
    --network. The exit status is 1 if anything is wrong. Changes nothing.

    \b
    pipeline verify --store S --shards 'train-{000000..000009}.tar'
    """
    from precompute.verify_targets import LiveTargets
    from storage.shards.patterns import expand
    from storage.store import verify as check
    from storage.store.store import Store

    urls = expand(shards) if shards else []
    console = Console()
    opened, report = Store.open(store), check.VerifyReport()
    if (weights or full) and not urls:
        raise UserError("--weights and --full: give the shards whose targets are compared: --shards …")
    live = LiveTargets(opened, report, weights, console.say) if urls else None
    check.verify(opened, urls, samples=0 if full else samples, say=console.say, look=live, report=report)
    result = {"store": store, "ok": not report.failures, **asdict(report)}
    verdict = "everything is intact" if not report.failures else f"{len(report.failures)} failure(s)"
    rendered = ", no views rendered (give --shards)"
    if urls:
        rendered = f", {report.views_rendered:,} views rendered again, {report.targets_compared:,} targets compared"
    tail = [f"{report.objects:,} checks{rendered}: {verdict}"]
    if report.spoilt:
        most = report.spoilt[:SHOWN]
        more = [f"  and {len(report.spoilt) - SHOWN:,} more: --json names all"] if report.spoilt[SHOWN:] else []
        tail += ["Delete these files, and the same precompute command recomputes what is damaged:"]
        tail += [*(f"  {name}" for name in most), *more]
    show(result, [*report.failures, *report.notices, *tail], as_json)
    if report.failures:
        raise SystemExit(1)
