"""Commands from images to a store: pack, precompute, plan, inspect, verify."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from pipeline.console import Console, show
from pipeline.options import QUOTES, Hinted, common, shards, store, wanted
from pipeline.project import FILE, load, reads
from storage.errors import UserError

if TYPE_CHECKING:
    from precompute.run import Wanted

SHOWN = 10  # files of a list that are named; --json names all


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=Path("pipeline.yaml"), show_default=True,
              help="The project file.")  # fmt: skip
@common
def init(folder: Path, out: Path, as_json: bool) -> None:
    """Write a project file for a folder of shards or images.

    It looks at the shards, or at the images in one folder a class, and asks nothing.

    \b
    pipeline init photos
    """
    from pipeline.starting import init as run

    console = Console()
    try:
        result = run(folder, out, console)
    finally:
        console.stop()
    count = f"{len(result['classes'])} classes" if result["classes"] else "classes without names"
    images = f"{'about ' if result['estimated'] else ''}{result['images']:,} images"
    held = ", ".join([*map(shlex.quote, result["val"][:3]), *["…"] * (len(result["val"]) > 3)])
    lines = [
        f"{result['project']}: {images}, {count}, about {result['side']} pixels",
        f"for validation: {held} ({result['val_because']}); go on with",
    ]
    show(result, [*lines, *(f"  {command}" for command in result["commands"])], as_json)


@click.command()
@click.argument(
    "places",
    nargs=-1,
    required=True,
    metavar="SOURCE... [OUT]",
    type=Hinted("Give a source and the new shards' names: pipeline pack photos train-000000.tar"),
)
@click.option("--per-shard", type=click.IntRange(1), help="Samples a shard; by default spread over all names.")
@click.option("--val-fraction", type=float, metavar="F",
              help="Part of each class for validation, at least one.  [default: 0; without OUT 0.1]")  # fmt: skip
@click.option("--fraction", type=float, default=1.0, help="Part of each class that is kept, class-balanced.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the order and of both choices.")
@click.option("--no-shuffle", is_flag=True, help="Keep the order of the source.")
@common
def pack(
    places: tuple[str, ...],
    per_shard: int | None,
    val_fraction: float | None,
    fraction: float,
    seed: int,
    no_shuffle: bool,
    as_json: bool,
) -> None:
    """Make shards from class folders, a CSV or other shards.

    SOURCE is a folder with one folder of images a class, a CSV with the columns path and label, or shards (compressed
    ones too). OUT names the new shards; without it they get the names that pipeline.yaml has.

    \b
    pipeline pack photos 'train-{000000..000009}.tar' --val-fraction 0.1
    pipeline pack list.csv 'listed/train-{000000..000009}.tar'
    pipeline pack 'train-{000000..000009}.tar' 'tenth/train-000000.tar' --fraction 0.1
    """
    from storage.pack import pack as run

    source, out = list(places[:-1]), places[-1]
    if len(source) > 1 and any(Path(one).is_dir() or one.lower().endswith(".csv") for one in source):
        raise click.UsageError(f"a folder or a CSV is packed alone, into shards of one name. {QUOTES}")
    if not source:
        source, out = [out], _shards_of_project(out)
        val_fraction = 0.1 if val_fraction is None else val_fraction
    console = Console()
    result = run(
        source if len(source) > 1 else source[0], out, per_shard=per_shard, val_fraction=val_fraction or 0.0,
        fraction=fraction, seed=seed, shuffle=not no_shuffle, say=console.say,
    )  # fmt: skip
    counts = ", ".join(
        f"{count} samples in {len(result[part])} {part} shard(s)" for part, count in result["samples"].items()
    )
    show(result, [counts, *result["train"], *result["val"]], as_json)


def _shards_of_project(source: str) -> str:
    """The one pattern of shards that the project file in this folder has."""
    path = Path(FILE)
    said = load(path).said("shards") if path.is_file() else None
    if not said or len(said) != 1:
        raise click.UsageError(
            f"name the new shards, such as: pipeline pack {shlex.quote(source)} 'train-{{000000..000009}}.tar'"
            + (f"; {path} has no single pattern for them" if path.is_file() else "")
        )
    return str(said[0])


@click.command()
@wanted
@common
def precompute(store: str, wanted: Wanted | dict[str, Wanted], as_json: bool) -> None:
    """Run a teacher once over shards and keep its targets.

    The same command goes on where it was. Without --teacher, all teachers of the project file, one after another.

    \b
    pipeline precompute --teacher mobilenetv2 --weights mobilenetv2.safetensors --shards 'train-{000000..000009}.tar' \\
      --store S --view-policy light --view-size 32 --target activations,grid=8,codec=u8
    pipeline precompute --teacher vit_tiny --weights vit_tiny.safetensors --shards 'train-{000000..000009}.tar' \\
      --store S --target embedding
    """
    from precompute.run import precompute as run
    from storage.store import Store

    console = Console()
    results, text = {}, []
    try:
        for name, one in wanted.items() if isinstance(wanted, dict) else [("", wanted)]:
            results[name] = result = run(Store.create(store), one, console)
            failed = [f"failed: {failure['error']}" for failure in result["failures"]]
            count = f", {len(failed)} failed: the same command tries them again" if failed else ""
            done = f"{len(result['targets'])} target(s) over {len(result['shards'])} shard(s){count}: {store}"
            text += [*failed, f"{name}: {done}" if name else done]
    finally:
        console.stop()
    show({"store": store, "teachers": results} if isinstance(wanted, dict) else results[""], text, as_json)
    if any(result["failures"] for result in results.values()):
        raise SystemExit(1)


@click.command()
@wanted
@click.option("--measure", type=click.FloatRange(0), default=60, show_default=True, metavar="SECONDS",
              help="How long the engine is tried out at most; 0 for not at all.")  # fmt: skip
@click.option("--train-rate", type=click.FloatRange(0, min_open=True), default=1000, show_default=True,
              metavar="N", help="Images a second that a training is to read.")  # fmt: skip
@common
def plan(store: str, wanted: Wanted | dict[str, Wanted], measure: float, train_rate: float, as_json: bool) -> None:
    """Say what `precompute` with the same flags would take.

    Bytes, objects, hours, and what would be cheaper. For each teacher the engine runs beside the store for at most a
    minute, and a tenth of the time that it foretells; nothing is left behind.

    \b
    pipeline plan --teacher mobilenetv2 --weights mobilenetv2.safetensors --shards 'train-{000000..000009}.tar' \\
      --store S --view-policy light --view-size 32 --target activations,grid=8,codec=u8
    """
    from pipeline.inspection import plan_lines, sum_lines, sum_of
    from precompute.plan import plan as run

    console = Console()
    try:
        if not isinstance(wanted, dict):
            result = run(store, wanted, console, measure, train_rate)
            text = plan_lines(result)
        else:
            plans = {name: run(store, one, console, measure, train_rate) for name, one in wanted.items()}
            result = {"teachers": plans, "sum": sum_of(plans)}
            text = [line for name, one in plans.items() for line in (f"{name}:", *plan_lines(one))]
            text += sum_lines(result["sum"])
    finally:
        console.stop()
    show(result, text, as_json)


@click.command()
@store
@click.option("--sample", metavar="KEY", help="Draw what is stored of this sample of --shards into --out.")
@shards("--shards", help="Shards among which the sample is.", required=False)
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE",
              help="The picture of the sample: .png, .svg or .pdf; one that is there is written over.")  # fmt: skip
@reads(store="store", shards="shards")
@common
def inspect(store: str, sample: str | None, shards: tuple[str, ...], out: Path | None, as_json: bool) -> None:
    """Say what is in a store, or draw a sample of it.

    Teachers, banks, targets, how much of each is complete, and its size.

    With --sample, draw what is stored of one sample: its image with the crops of its views (six at most), each view as
    the teachers saw it, and each target over it.

    \b
    pipeline inspect --store S
    pipeline inspect --store S --shards 'train-{000000..000009}.tar' --sample cat_7 --out cat_7.png
    """
    from pipeline import inspection
    from storage.store import Store

    given = click.get_current_context().get_parameter_source("shards")
    if sample is None and (out is not None or given == ParameterSource.COMMANDLINE):
        raise click.UsageError("--shards and --out are for the picture of one sample: add --sample KEY, or leave both")
    if sample is None:
        result = inspection.inspect(Store.open(store))
        show(result, inspection.lines(result), as_json)
        return
    if not shards or out is None:
        add = " and ".join(["--shards SHARDS"] * (not shards) + ["--out FILE.png"] * (out is None))
        raise click.UsageError(f"--sample {sample} is drawn from its shard into a picture: add {add}")
    from pipeline import pictures
    from pipeline import sample as samples
    from pipeline.sample_picture import picture
    from storage.shards import expand

    file = pictures.picture_path(out)
    found = samples.stored_sample(Store.open(store), expand(shards), sample)
    pictures.save(picture(found), file)
    show({**samples.facts(found), "files": [str(file)]}, [*samples.lines(found), f"written: {file}"], as_json)


@click.command()
@store
@shards("--shards", help="Shards whose views are rendered again and shown to the teacher.", required=False)
@click.option("--samples", type=click.IntRange(1), default=64, show_default=True,
              help="Samples of these shards, in all their views, spread evenly.")  # fmt: skip
@click.option("--full", is_flag=True, help="All samples.")
@click.option("--weights", multiple=True, metavar="F",
              help="A recorded teacher's weights, if not at the recorded path; may be repeated.")  # fmt: skip
@reads(store="store", shards="shards")
@common
def verify(
    store: str, shards: tuple[str, ...], samples: int, full: bool, weights: tuple[str, ...], as_json: bool
) -> None:
    """Check every byte of a store, its pixels and targets.

    Shards have to give the pixels and the targets that it holds. Targets are compared with the live PyTorch teacher
    where its weights are at hand, else with the stored graph. Exit status 1 if anything is wrong; nothing is changed.

    \b
    pipeline verify --store S --shards 'train-{000000..000009}.tar'
    """
    from precompute.check import Live
    from storage.shards import expand
    from storage.store import Store
    from storage.verify import Report
    from storage.verify import verify as run

    urls = expand(shards) if shards else []
    console = Console()
    opened, report = Store.open(store), Report()
    if (weights or full) and not urls:
        raise UserError("--weights and --full: give the shards whose targets are compared: --shards …")
    live = Live(opened, report, weights, console.say) if urls else None
    run(opened, urls, 0 if full else samples, console.say, live, report)
    result = {
        "store": store, "ok": not report.failures, "objects": report.objects, "views_rendered": report.views_rendered,
        "targets_compared": report.targets_compared, "compared_with": report.compared_with,
        "failures": report.failures, "spoilt": report.spoilt, "notices": report.notices,
    }  # fmt: skip
    verdict = "everything is as it was written" if not report.failures else f"{len(report.failures)} failure(s)"
    rendered = ", no views rendered (give --shards)"
    if urls:
        rendered = f", {report.views_rendered:,} views rendered again, {report.targets_compared:,} targets compared"
    tail = [f"{report.objects:,} checks{rendered}: {verdict}"]
    if report.spoilt:
        most = report.spoilt[:SHOWN]
        more = [f"  and {len(report.spoilt) - SHOWN:,} more: --json names all"] if report.spoilt[SHOWN:] else []
        tail += ["Delete these files, and the same precompute command makes anew what is damaged:"]
        tail += [*(f"  {name}" for name in most), *more]
    show(result, [*report.failures, *report.notices, *tail], as_json)
    if report.failures:
        raise SystemExit(1)
