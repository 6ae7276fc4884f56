"""`pipeline fit-teacher`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from pipeline.console import Console, show
from pipeline.options import PATH, Words, common, device, option, shards, store
from pipeline.project.context import reads


def name_of(path: str) -> str:
    """A valid teacher name for a store, from the file name."""
    name = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in Path(path).stem)[:40]
    return "fitted_views" if name == "views" else name or "fitted"


@click.command("fit-teacher")
@store
@click.option("--target", metavar="ID", help="A stored class_token or embedding; `pipeline inspect` lists them.")
@click.option("--teacher", metavar="NAME", help="Or a teacher in the store, if exactly one of its targets fits.")
@shards("--shards", help="Labeled training shards whose features are in the store.")
@shards("--val", help="Validation shards.")
@click.option("--out", required=True, type=PATH, metavar="F", help="A new .safetensors file.")
@click.option("--weights", metavar="F", help="The teacher's weights, if they are not at the recorded path.")
@click.option("--num-views", type=click.IntRange(1), metavar="N", help="Views to use per image.  [default: all]")
@option("--l2", "X", "Strength of the L2 penalty.  [default: best on held-out]", type=click.FloatRange(0))
@click.option("--seed", type=int, default=0, show_default=True, help="Selects the held-out samples.")
@device
@reads(store="store", shards="shards", val="val")
@common
def fit_teacher(
    *,
    store: str,
    target: str | None,
    teacher: str | None,
    shards: Words,
    val: Words,
    out: Path,
    weights: str | None,
    num_views: int | None,
    l2: float | None,
    seed: int,
    device: str,
    as_json: bool,
) -> None:
    """Fit a head for your classes to stored features.

    The head is linear. Network and head are written to a file as a new teacher. Features and mixed labels are read from
    the store, class names from classes.json beside the shards.

    \b
    pipeline fit-teacher --store S --teacher vit_tiny --shards 'train-{000000..000009}.tar' \\
      --val train-val-000000.tar --out vit_tiny-photos.safetensors
    """
    from storage.store.store import Store
    from student.distributed import pick_device
    from student.fit_teacher import fit
    from student.targets import hints

    config = fit.FitTeacherConfig(
        store=Store.open(store),
        shards=shards,
        val=val,
        out=out,
        target=target,
        teacher=teacher,
        weights=weights,
        views=num_views,
        l2=l2,
        seed=seed,
        device=str(pick_device(device)),
    )
    with Console() as console:
        result = fit.fit_teacher(config, console)
    command = hints.precompute(  # stores the logits for the shards and views that the head was fitted on
        teacher=result.model,
        teacher_name=name_of(result.out),
        weights=result.out,
        arguments=result.arguments,
        mean=result.mean,
        std=result.std,
        input_size=result.input_size,
        store=store,
        shards=shards,
        view_policy=result.policy,
        view_size=result.view_size,
        seed=result.view_seed,
        target="logits",
    )
    top5 = f", top-5 {result.top5:.2f} %" if result.top5 is not None else ""
    lines = [
        f"top-1 {result.top1:.2f} %{top5} on {result.samples} samples: {result.out}",
        "its logits can be stored like any other teacher's:",
        f"  {command}",
    ]
    show({**asdict(result), "command": command}, lines, as_json)
