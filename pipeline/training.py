"""Commands from a store to a student: train, predict, export, fit-teacher."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.console import Console, show
from pipeline.options import Hinted, common, shards, store
from pipeline.project import over, reads
from storage.errors import UserError

if TYPE_CHECKING:
    from student.config import Recipe


@click.command()
@click.option("--recipe", required=True, type=Hinted("`pipeline recipes` lists them."),
              help="A recipe's name (scratch, aal, …) or a YAML file.")  # fmt: skip
@shards("--shards", help="Training shards.")
@shards("--val", required=False, help="Validation shards; recipes that learn without labels need none.")
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
    """Train a student by a recipe.

    Targets come from a store where the recipe needs them. What recipes can say is in docs/recipes.md; there are
    (NAME-small is for small images and minutes)

    \b
    aal, advit-l1, attention-copy, attention-distill, attndistill, compress,
    deit-hard, deit-soft, feature-mse, fine-tune, head-specific, scratch, seed,
    simreg

    The same command with --resume goes on where a run was cut off. On several GPUs or processes:
    torchrun --nproc-per-node N -m pipeline train …

    \b
    pipeline train --recipe aal-small --store S --shards 'train-{000000..000009}.tar' --val train-val-000000.tar \\
      --out run
    """
    if resume and smoke:
        raise click.UsageError("--resume and --smoke: a smoke run never goes on; choose one")

    from pipeline.recipes import load

    def asked() -> Recipe:
        from student.config import with_same_classes

        chosen = load(recipe, settings, over())
        return with_same_classes(chosen) if same_classes else chosen

    if "RANK" not in os.environ:
        _require_val(asked(), shards, val)  # a slip is told before torch is imported; under torchrun by one rank, below

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
        score = "no score was taken"
        if result["top1"] is not None:
            score = f"top-1 {result['top1']:.2f} % (best {result['best_top1']:.2f} %{averaged}){top5} on "
            score += f"{result['samples']} samples"
        show(result, [f"{'a smoke run, nothing was learned: ' if smoke else ''}{score}: {out}"], as_json)


def _require_val(recipe: Recipe, shards: tuple[str, ...], val: tuple[str, ...]) -> None:
    """A usage error where validation shards are missing that the recipe needs.

    UserError where what was given as shards is none: it says how they are made, with validation shards.
    """
    if val:
        return
    from student.lesson import reads_of

    if "labels" in reads_of(recipe):
        from storage.shards import expand

        expand(shards)
        context = click.get_current_context()
        raise click.MissingParameter(ctx=context, param=next(p for p in context.command.params if p.name == "val"))


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...", type=click.Path(path_type=Path))
@click.option("--top", type=click.IntRange(1), default=3, show_default=True, help="How many classes of each image.")
@click.option("--checkpoint", type=click.Choice(["last", "best", "ema"]), default="last", show_default=True,
              help="Which student.")  # fmt: skip
@click.option("--store", metavar="DIR",
              help="Of a student that copies attention: where its teacher is, if not where it was.")  # fmt: skip
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@reads(store="store")
@common
def predict(
    run: Path, images: tuple[Path, ...], top: int, checkpoint: str, store: str | None, device: str, as_json: bool
) -> None:
    """What a run's student sees in images.

    Class names and probabilities; a folder stands for the images in it. One that cannot be read is named on stderr,
    the others are answered, and the exit status is 1.

    \b
    pipeline predict run photos/cat/1.jpg photos/dog
    """
    from pipeline.copied import beside
    from student.device import pick_device
    from student.model import load_classifier
    from student.predict import found_in
    from student.predict import predict as ask

    path = student_file(run, checkpoint)
    model, about = load_classifier(path)
    console = Console()
    files = found_in(images, console.say)
    model = model.to(pick_device(device))
    lent = beside(model, about, store)
    console.start("looking", len(files))
    try:
        seen, broken = ask(model, about, files, top, console.advance, beside=lent)
    finally:
        console.stop()
    lines = [f"{file}: {', '.join(f'{name} {100 * p:.1f} %' for name, p in classes)}" for file, classes in seen]
    result = {
        "student": str(path), "view": about.evaluation,
        "images": [{"image": file, "classes": [{"class": n, "probability": p} for n, p in c]} for file, c in seen],
        "errors": [{"image": file, "error": why} for file, why in broken],
    }  # fmt: skip
    said = [f"{file}: {why}" for file, why in broken]
    if not seen:
        raise UserError("\n".join(said))
    show(result, lines, as_json)
    for line in said:
        console.say(f"error: {line}")
    if broken:
        raise SystemExit(1)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@shards("--shards", help="Shards with images that the graph is checked on.")
@click.option("--out", type=click.Path(path_type=Path), metavar="F", help="The graph.  [default: RUN/student.onnx]")
@click.option("--checkpoint", type=click.Choice(["last", "best", "ema"]), default="last", show_default=True,
              help="Which student.")  # fmt: skip
@reads(shards="val")
@common
def export(run: Path, shards: tuple[str, ...], out: Path | None, checkpoint: str, as_json: bool) -> None:
    """Write a run's student as an ONNX graph.

    From uint8 images [B, S, S, 3] to logits [B, K], checked on real images; to features, `embedding` [B, D], of a
    student without a classifier. Class names, view size and evaluation
    view are in its metadata.

    \b
    pipeline export run --shards train-val-000000.tar
    """
    from pipeline.deploying import export as run_

    path = student_file(run, checkpoint)
    result = run_(path, shards, out or path.with_name("student.onnx"))
    show(result, [f"{result['graph']}: {result['bytes']:,} bytes, checked on {result['checked']} images"], as_json)


def student_file(run: Path, checkpoint: str) -> Path:
    """The file of a run's student; a file stands for itself. Raises UserError: the run has others, not this one."""
    path = run / f"{checkpoint}.safetensors" if run.is_dir() or not run.suffix else run
    others = [name for name in ("last", "best", "ema") if (run / f"{name}.safetensors").is_file()]
    if others and not path.exists():
        why = " (an average is kept with --set ema=0.999)" if checkpoint == "ema" else ""
        raise UserError(
            f"{run} has no student {checkpoint!r}{why}; it has {', '.join(others)}: --checkpoint {others[0]}"
        )
    if not path.exists() and not run.suffix:
        begun = (run / "args.yaml").exists()
        do = "go on with the same `pipeline train` command and --resume" if begun else "`pipeline train` writes one"
        raise UserError(f"{run}: {'no student here yet' if begun else 'no student here'}; {do}")
    return path


@click.command("fit-teacher")
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
    """Fit a head for your classes on what a teacher saw.

    The head is linear; network and head are written out as a new teacher. Features and mixed labels come from the
    store, class names from classes.json beside the shards.

    \b
    pipeline fit-teacher --store S --teacher vit_tiny --shards 'train-{000000..000009}.tar' \\
      --val train-val-000000.tar --out vit_tiny-photos.safetensors
    """
    from pipeline import teaching
    from storage.store import Store
    from student.device import pick_device
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
