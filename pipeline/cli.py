"""The commands. Everything heavy is imported inside the command that needs it, so that `--help` answers at once."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.console import Console, show
from pipeline.options import common, shards, store, wanted
from pipeline.project import over, reads
from storage.errors import UserError, nearest

if TYPE_CHECKING:
    from precompute.run import Wanted
    from student.config import Recipe


class _Commands(click.Group):
    """A group that names the nearest command."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """The command that the first argument names."""
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            raise click.UsageError(f"no command is called {args[0]!r}. {nearest(args[0], self.commands)}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="teacher-store")
def cli() -> None:
    """Run a pretrained teacher once over image shards, keep what it saw, and train students from it.

    \b
    pipeline pack photos 'train-{000000..000009}.tar' --val-fraction 0.1
    pipeline precompute --teacher mobilenetv2 --shards 'train-{000000..000009}.tar' --store S
    pipeline train --recipe aal --store S --shards 'train-{000000..000009}.tar' --val train-val-000000.tar --out run
    pipeline evaluate run --shards train-val-000000.tar
    """


@cli.command()
@click.argument("source", nargs=-1, required=True)
@click.argument("out")
@click.option("--per-shard", type=click.IntRange(1), help="Samples a shard; by default spread over all names.")
@click.option("--val-fraction", type=float, default=0.0, help="Part of each class for validation shards.")
@click.option("--fraction", type=float, default=1.0, help="Part of each class that is kept, class-balanced.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the order and of both choices.")
@click.option("--no-shuffle", is_flag=True, help="Keep the order of the source.")
@common
def pack(
    source: tuple[str, ...],
    out: str,
    per_shard: int | None,
    val_fraction: float,
    fraction: float,
    seed: int,
    no_shuffle: bool,
    as_json: bool,
) -> None:
    """Make shards from a FOLDER of class folders, a CSV with the columns path and label, or from other shards
    (compressed ones too).

    \b
    pipeline pack photos 'train-{000000..000009}.tar' --val-fraction 0.1
    pipeline pack list.csv 'train-{000000..000009}.tar'
    pipeline pack 'train-{000000..000009}.tar' 'tenth/train-000000.tar' --fraction 0.1
    """
    from storage.pack import pack as run

    console = Console()
    result = run(
        list(source) if len(source) > 1 else source[0], out, per_shard=per_shard, val_fraction=val_fraction,
        fraction=fraction, seed=seed, shuffle=not no_shuffle, say=console.say,
    )  # fmt: skip
    counts = ", ".join(
        f"{count} samples in {len(result[part])} {part} shard(s)" for part, count in result["samples"].items()
    )
    show(result, [counts, *result["train"], *result["val"]], as_json)


@cli.command()
@wanted
@common
def precompute(store: str, wanted: Wanted | dict[str, Wanted], as_json: bool) -> None:
    """Run a teacher once over shards and keep its targets. The same command goes on where it was.

    Without --teacher, all teachers of the project file, one after another.

    \b
    pipeline precompute --teacher mobilenetv2 --weights mobilenetv2.safetensors --shards 'train-{000000..000009}.tar' \\
      --store S --view-policy light --view-size 32 --target activations,grid=8,codec=u8
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


@cli.command()
@wanted
@click.option("--measure", type=click.FloatRange(0), default=60, show_default=True, metavar="SECONDS",
              help="How long the engine is tried out; 0 for not at all.")  # fmt: skip
@click.option("--train-rate", type=click.FloatRange(0, min_open=True), default=1000, show_default=True,
              metavar="N", help="Images a second that a training is to read.")  # fmt: skip
@common
def plan(store: str, wanted: Wanted | dict[str, Wanted], measure: float, train_rate: float, as_json: bool) -> None:
    """Say what `precompute` with the same flags would take: bytes, objects, hours, and what would be cheaper.

    The engine runs for about a minute a teacher beside the store; nothing is left behind.

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


@cli.command()
@store
@reads(store="store")
@common
def inspect(store: str, as_json: bool) -> None:
    """Say what is in a store: teachers, banks, targets, how much of each is complete, and its size.

    \b
    pipeline inspect --store S
    """
    from pipeline.inspection import inspect as run
    from pipeline.inspection import lines
    from storage.store import Store

    result = run(Store.open(store))
    show(result, lines(result), as_json)


@cli.command()
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
    """Check every byte of a store, and that shards still give the pixels and the targets that it holds.

    Targets are compared with the live PyTorch teacher where its weights are at hand, else with the stored graph.
    Exit status 1 if anything is wrong; nothing is changed.

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
        "failures": report.failures, "notices": report.notices,
    }  # fmt: skip
    verdict = "everything is as it was written" if not report.failures else f"{len(report.failures)} failure(s)"
    rendered = ", no views rendered (give --shards)"
    if urls:
        rendered = f", {report.views_rendered:,} views rendered again, {report.targets_compared:,} targets compared"
    advice = "  What is damaged in a view is made anew by precompute once its marker (done/…) is deleted."
    tail = [advice] if report.failures else []
    show(result, [*report.failures, *report.notices, *tail, f"{report.objects:,} checks{rendered}: {verdict}"], as_json)
    if report.failures:
        raise SystemExit(1)


@cli.command()
@click.option("--recipe", required=True, help="A recipe's name (scratch, aal, …) or a YAML file.")
@shards("--shards", help="Training shards.")
@shards("--val", help="Validation shards.")
@click.option("--store", metavar="DIR", help="The store with the targets; without one, views are drawn afresh.")
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="RUN", help="A new folder for the run.")
@click.option("--set", "settings", multiple=True, metavar="PATH=VALUE", help="Change a setting; may be repeated.")
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in RUN; everything else stays the same.")
@click.option("--same-classes", is_flag=True,
              help="Teacher and student have the same classes in one order, though a list is unknown.")  # fmt: skip
@click.option("--smoke", is_flag=True, help="A few steps of each phase, to see that everything works.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@reads(shards="shards", val="val", store="store")
@common
def train(
    recipe: str,
    shards: tuple[str, ...],
    val: tuple[str, ...],
    store: str | None,
    out: Path,
    settings: tuple[str, ...],
    resume: bool,
    same_classes: bool,
    smoke: bool,
    device: str,
    as_json: bool,
) -> None:
    """Train a student by a recipe, with targets from a store where the recipe needs them.

    The same command with --resume goes on where a run was cut off. On several GPUs or processes:
    torchrun --nproc-per-node N -m pipeline train …

    \b
    pipeline train --recipe aal --store S --shards 'train-{000000..000009}.tar' --val train-val-000000.tar --out run \\
      --set student.model=vit_tiny_patch16_224 --set student.img_size=32 --set student.patch_size=4 \\
      --set student.embed_dim=128 --set student.depth=6 --set student.num_heads=4 --set stream.batch_size=128
    """
    if resume and smoke:
        raise click.UsageError("--resume and --smoke: a smoke run never goes on; choose one")

    from pipeline.recipes import load

    def asked() -> Recipe:
        from student.config import with_same_classes

        chosen = load(recipe, settings, over())
        return with_same_classes(chosen) if same_classes else chosen

    if "RANK" not in os.environ:
        asked()  # a slip is told before torch is imported; under torchrun by one rank, below

    from storage.store import Store
    from student.ranks import joined, rank
    from student.train import Job
    from student.train import train as run

    with joined(device) as where:
        console = Console()
        opened = Store.open(store) if store else None
        try:
            result = run(Job(asked(), shards, val, out, opened, str(where), resume, smoke), console)
        finally:
            console.stop()
        if rank():
            return
        top5 = f", top-5 {result['top5']:.2f} %" if result["top5"] is not None else ""
        averaged = f", averaged {result['ema_top1']:.2f} %" if "ema_top1" in result else ""
        text = (
            f"{'a smoke run, nothing was learned: ' if smoke else ''}top-1 {result['top1']:.2f} % "
            f"(best {result['best_top1']:.2f} %{averaged}){top5} on {result['samples']} samples: {out}"
        )
        show(result, [text], as_json)


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@shards("--shards", help="Labelled shards.")
@click.option("--checkpoint", type=click.Choice(["last", "best", "ema"]), default="last", show_default=True,
              help="Which student; `best` was chosen on the validation shards, `ema` is the average.")  # fmt: skip
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@reads(shards="val")
@common
def evaluate(run: Path, shards: tuple[str, ...], checkpoint: str, device: str, as_json: bool) -> None:
    """Accuracy of a run's student over shards, every sample once, on the evaluation view of its policy.

    \b
    pipeline evaluate run --shards 'val-{000000..000001}.tar'
    """
    from storage.policies import policy
    from storage.shards import cached_index, classes_of, expand

    urls = expand(shards)

    from storage.errors import IdentityError
    from student.evaluate import evaluate as score_of
    from student.folder import is_smoke
    from student.model import load, pick_device

    path = run / f"{checkpoint}.safetensors" if run.is_dir() or not run.suffix else run
    model, about = load(path)
    names = classes_of(urls)
    if names and about.classes and tuple(names) != about.classes:
        raise IdentityError(f"{urls[0]}: classes.json", "classes", list(about.classes), names)
    where = pick_device(device)
    console = Console()
    console.start("evaluating", sum(len(cached_index(url)) for url in urls))
    try:
        score = score_of(
            model.to(where), urls, policy(about.evaluation, about.img_size), about.mean, about.std, device=where,
            advance=console.advance,
        )  # fmt: skip
    finally:
        console.stop()
    top5 = f", top-5 {score.top5:.2f} %" if score.top5 is not None else ""
    result = {
        "top1": score.top1,
        "top5": score.top5,
        "samples": score.samples,
        "student": str(path),
        "view": about.evaluation,
        "smoke": is_smoke(path.parent),
    }
    if result["smoke"]:
        console.say(f"{path}: of a smoke run, which has learned nothing")
    show(result, [f"top-1 {score.top1:.2f} %{top5} on {score.samples} samples ({about.evaluation})"], as_json)


@cli.command("fit-teacher")
@store
@click.option("--target", metavar="ID", help="A stored class_token or embedding; `pipeline inspect` lists them.")
@click.option("--teacher", metavar="NAME", help="Or the recorded teacher, where one such target of it fits.")
@shards("--shards", help="Labelled training shards that the store has features of.")
@shards("--val", help="Validation shards.")
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="F", help="A new .safetensors file.")
@click.option("--weights", metavar="F", help="The recorded teacher's weights, if not at the recorded path.")
@click.option("--view-count", type=click.IntRange(1), metavar="N", help="Views of each image.  [default: all]")
@click.option("--l2", type=click.FloatRange(0), metavar="X",
              help="Strength of the L2 term; by default chosen on held-out training samples.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Of what is held out.")
@click.option("--device", default="auto", show_default=True, help="Where accuracy is measured: auto, cpu, cuda …")
@reads(store="store", shards="shards", val="val")
@common
def fit_teacher(
    store: str,
    target: str | None,
    teacher: str | None,
    shards: tuple[str, ...],
    val: tuple[str, ...],
    out: Path,
    weights: str | None,
    view_count: int | None,
    l2: float | None,
    seed: int,
    device: str,
    as_json: bool,
) -> None:
    """Fit a linear head for the shards' classes on what a teacher saw, and write both out as a new teacher.

    Features and mixed labels come from the store, class names from classes.json beside the shards.

    \b
    pipeline fit-teacher --store S --teacher vit_tiny --shards 'train-{000000..000009}.tar' \\
      --val train-val-000000.tar --out vit_tiny-photos.safetensors
    """
    from pipeline import teaching
    from storage.store import Store
    from student.model import pick_device
    from student.teach import Job
    from student.teach import fit_teacher as run

    console = Console()
    job = Job(
        Store.open(store), shards, val, out, target, teacher, weights, view_count, l2, seed, str(pick_device(device))
    )
    try:
        result = run(job, console)
    finally:
        console.stop()
    result["command"] = teaching.command(result, store, shards)
    show(result, teaching.lines(result), as_json)


@cli.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("demo-out"), show_default=True, help="A new folder."
)
@common
def demo(out: Path, as_json: bool) -> None:
    """The whole path on handwritten digits, offline: pack, a teacher, precompute, two students, a table.

    \b
    pipeline demo --out demo-out
    """
    from pipeline.demo import demo as run

    console = Console()
    try:
        result = run(out, console)
    finally:
        console.stop()
    show(result, result["table"], as_json)


class _Terminated(KeyboardInterrupt):
    """SIGTERM came: schedulers of clusters send it before they kill."""


def _terminate(number: int, frame: object) -> None:
    raise _Terminated


def main(arguments: list[str] | None = None) -> None:
    """Run a command; exit with 0, 1 for what a user can mend, 2 for usage, 130 and 143 after SIGINT and SIGTERM."""
    words = sys.argv[1:] if arguments is None else arguments
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    debug, as_json = "--debug" in words, "--json" in words
    try:
        status = cli.main(args=words, prog_name="pipeline", standalone_mode=False)
        raise SystemExit(status if isinstance(status, int) else 0)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.ctx.get_help() if error.ctx else error.message)
        raise SystemExit(2) from None
    except click.UsageError as error:
        if os.environ.get("RANK", "0") == "0":
            error.show()
        else:  # torchrun's first process says the same, and has to come to it before all are ended
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(1)
        raise SystemExit(2) from None
    except (click.Abort, KeyboardInterrupt) as error:
        status = 143 if isinstance(error.__cause__ or error, _Terminated) else 130
        _fail(
            "interrupted; what was complete stays (precompute: the same command goes on; train: add --resume)",
            as_json,
            status,
        )
    except (UserError, click.ClickException) as error:
        if debug:
            raise
        _fail(str(error), as_json, 1)
    except BrokenPipeError:
        raise SystemExit(1) from None
    except OSError as error:
        if debug:
            raise
        _fail(f"{error.filename or 'input or output'}: {error.strerror or error}", as_json, 1)
    except Exception as error:
        if debug:
            raise
        text = f"{type(error).__name__}: {error}"
        _fail(f"this should not happen: {text}\n  Run it again with --debug and report what it shows.", as_json, 1)


def _fail(text: str, as_json: bool, status: int) -> None:
    print(f"error: {text}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": text}))
    raise SystemExit(status) from None
