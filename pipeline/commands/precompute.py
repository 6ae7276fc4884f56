"""`pipeline precompute` and `pipeline plan`: compute targets for shards into a store, and estimate the cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pipeline.console import Console, show
from pipeline.options import common, wanted

if TYPE_CHECKING:
    from precompute.request import PrecomputeRequest


@click.command()
@wanted
@common
def precompute(store: str, wanted: PrecomputeRequest | dict[str, PrecomputeRequest], as_json: bool) -> None:
    """Run a teacher once over shards and store its targets.

    Run the same command again to resume. Without --teacher, all teachers of the project file run, one after another.

    \b
    pipeline precompute --teacher mobilenetv2 --weights mobilenetv2.safetensors --shards 'train-{000000..000009}.tar' \\
      --store S --view-policy light --view-size 32 --target activations,grid=8,codec=u8
    pipeline precompute --teacher vit_tiny --weights vit_tiny.safetensors --shards 'train-{000000..000009}.tar' \\
      --store S --target embedding
    """
    from precompute.run import precompute as run
    from storage.store.store import Store

    console = Console()
    results, text = {}, []
    try:
        for name, one in wanted.items() if isinstance(wanted, dict) else [("", wanted)]:
            results[name] = result = run(Store.create(store), one, console)
            failed = [f"failed: {failure.error}" for failure in result.failures]
            count = f", {len(failed)} failed: run the same command again to retry" if failed else ""
            done = f"{len(result.targets)} target(s) over {len(result.shards)} shard(s){count}: {store}"
            text += [*failed, f"{name}: {done}" if name else done]
    finally:
        console.stop()
    show({"store": store, "teachers": results} if isinstance(wanted, dict) else results[""], text, as_json)
    if any(result.failures for result in results.values()):
        raise SystemExit(1)


@click.command()
@wanted
@click.option(
    "--measure",
    type=click.FloatRange(0),
    default=60,
    show_default=True,
    metavar="SECONDS",
    help="Maximum time of the trial run; 0 skips it.",
)
@click.option(
    "--train-rate",
    type=click.FloatRange(0, min_open=True),
    default=1000,
    show_default=True,
    metavar="N",
    help="Images per second that training should read.",
)
@common
def plan(
    store: str,
    wanted: PrecomputeRequest | dict[str, PrecomputeRequest],
    measure: float,
    train_rate: float,
    as_json: bool,
) -> None:
    """Estimate the cost of `precompute` with the same flags.

    Prints bytes, objects, hours, and cheaper codecs. For each teacher, the engine runs next to the store for at most a
    minute, and at most a tenth of the estimated time. Temporary files are removed.

    \b
    pipeline plan --teacher mobilenetv2 --weights mobilenetv2.safetensors --shards 'train-{000000..000009}.tar' \\
      --store S --view-policy light --view-size 32 --target activations,grid=8,codec=u8
    """
    from pipeline.inspection.store import plan_lines, sum_lines, sum_of
    from precompute.plan import plan as run

    console = Console()
    try:
        if not isinstance(wanted, dict):
            result = run(store, wanted, console, measure, train_rate)
            show(result, plan_lines(result), as_json)
        else:
            plans = {name: run(store, request, console, measure, train_rate) for name, request in wanted.items()}
            total = sum_of(plans)
            text = [line for name, plan in plans.items() for line in (f"{name}:", *plan_lines(plan))]
            show({"teachers": plans, "sum": total}, [*text, *sum_lines(total)], as_json)
    finally:
        console.stop()
