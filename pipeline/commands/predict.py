"""`pipeline predict`."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.console import Console, show
from pipeline.options import common
from pipeline.project.context import reads
from pipeline.run_paths import student_file
from storage.errors import UserError


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
    from pipeline.live_copy_teacher import live_copy_teacher
    from student.distributed import pick_device
    from student.evaluation.predict import found_in
    from student.evaluation.predict import predict as ask
    from student.models.files import load_classifier

    path = student_file(run, checkpoint)
    model, about = load_classifier(path)
    console = Console()
    files = found_in(images, console.say)
    model = model.to(pick_device(device))
    lent = live_copy_teacher(model, about, store)
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
