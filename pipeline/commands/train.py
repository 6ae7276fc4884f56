"""`pipeline train`: from a store to a student."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.console import Console, show
from pipeline.options import Hinted, common, shards
from pipeline.project.context import over, reads

if TYPE_CHECKING:
    from student.recipe.schema import Recipe


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

    from pipeline.recipes.loader import load_recipe

    def asked() -> Recipe:
        from student.recipe.validate import with_same_classes

        chosen = load_recipe(recipe, settings, over())
        return with_same_classes(chosen) if same_classes else chosen

    if "RANK" not in os.environ:
        _require_val(asked(), shards, val)  # a slip is told before torch is imported; under torchrun by one rank, below

    from storage.store.store import Store
    from student.distributed import process_group, rank
    from student.training.setup import TrainConfig
    from student.training.train import train as run

    with process_group(device) as where:
        console = Console()
        opened = Store.open(store) if store else None
        try:
            config = TrainConfig(
                recipe=asked(),
                shards=shards,
                val=val,
                out=out,
                store=opened,
                device=str(where),
                resume=resume,
                smoke=smoke,
            )
            result = run(config, console)
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
    from student.training.distiller import student_taps_of

    if "labels" in student_taps_of(recipe):
        from storage.shards.patterns import expand

        expand(shards)
        context = click.get_current_context()
        raise click.MissingParameter(ctx=context, param=next(p for p in context.command.params if p.name == "val"))
