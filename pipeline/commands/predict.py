"""`pipeline predict`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from pipeline.console import Console, show
from pipeline.options import PATH, checkpoint, common, copied_store, device
from pipeline.project.context import reads
from pipeline.run_paths import student_file
from storage.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@click.argument("run", type=PATH)
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...", type=PATH)
@click.option("--top", type=click.IntRange(1), default=3, show_default=True, help="Number of classes per image.")
@checkpoint
@copied_store
@device
@reads(store="store")
@common
def predict(
    *, run: Path, images: tuple[Path, ...], top: int, checkpoint: str, store: str | None, device: str, as_json: bool
) -> None:
    """Predict classes of images.

    Prints class names and probabilities. A folder means all images in it. Images that cannot be read are listed on
    stderr, the others are predicted, and the exit status is 1.

    \b
    pipeline predict run photos/cat/1.jpg photos/dog
    """
    from pipeline.live_copy_teacher import live_copy_teacher
    from student.distributed import pick_device
    from student.evaluation import predict as prediction
    from student.models.files import load_classifier

    path = student_file(run, checkpoint)
    model, about = load_classifier(path)
    with Console() as console:
        files = prediction.found_in(images, console.say)
        model = model.to(pick_device(device))
        context = live_copy_teacher(model, about, store)
        console.start("predicting", len(files))
        predictions, unreadable = prediction.predict(model, about, files, top, advance=console.advance, context=context)
    errors = [f"{one.image}: {one.error}" for one in unreadable]
    if not predictions:
        raise UserError("\n".join(errors))
    result = {
        "student": str(path),
        "view": about.evaluation,
        "images": [one.to_json() for one in predictions],
        "errors": [asdict(one) for one in unreadable],
    }
    lines = [f"{one.image}: {', '.join(f'{name} {100 * p:.1f} %' for name, p in one.classes)}" for one in predictions]
    show(result, lines, as_json)
    for line in errors:
        console.say(f"error: {line}")
    if errors:
        raise SystemExit(1)
