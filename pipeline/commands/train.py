"""`pipeline train`: trains a student, from a store or on labels only."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from pipeline.console import Console, show
from pipeline.options import PATH, Hinted, Words, common, device, missing, option, shards
from pipeline.project.context import over, reads

if TYPE_CHECKING:
    from pathlib import Path

    from student.recipe.schema import Recipe


@click.command()
@option(
    "--recipe",
    None,
    "A recipe's name (scratch, aal, …) or a YAML file.",
    required=True,
    type=Hinted("`pipeline recipes` lists them."),
)
@shards("--shards", help="Training shards.")
@shards("--val", required=False, help="Validation shards; not needed for recipes without labels.")
@click.option("--store", metavar="DIR", help="The store with the targets; without it, images are augmented on the fly.")
@click.option("--out", required=True, type=PATH, metavar="RUN", help="A new folder for the run.")
@click.option("--set", "settings", multiple=True, metavar="PATH=VALUE", help="Override a setting; may be repeated.")
@click.option("--resume", is_flag=True, help="Resume from the checkpoint in RUN; give the same options otherwise.")
@option(
    "--same-classes", None, "Assume that teacher and student have the same classes if a list is unknown.", is_flag=True
)
@click.option("--smoke", is_flag=True, help="Run only a few steps of each phase, as a test.")
@device
@reads(shards="shards", val="val", store="store")
@common
def train(
    *,
    recipe: str,
    shards: Words,
    val: Words,
    store: str | None,
    out: Path,
    settings: Words,
    resume: bool,
    same_classes: bool,
    smoke: bool,
    device: str,
    as_json: bool,
) -> None:
    """Train a student with a recipe.

    If the recipe needs targets, they are read from the store. docs/recipes.md lists all settings. The built-in recipes
    are below; each has a small variant, NAME-small, that trains on small images in minutes:

    \b
    aal, advit-l1, attention-copy, attention-distill, attndistill, compress,
    deit-hard, deit-soft, feature-mse, fine-tune, head-specific, scratch, seed,
    simreg

    To resume a killed run, add --resume to the same command. For several GPUs or processes:
    torchrun --nproc-per-node N -m pipeline train …

    \b
    pipeline train --recipe aal-small --store S --shards 'train-{000000..000009}.tar' --val train-val-000000.tar \\
      --out run
    """
    if resume and smoke:
        raise click.UsageError("--resume and --smoke: a smoke run cannot be resumed; choose one")

    from pipeline.recipes.loader import load_recipe

    def chosen_recipe() -> Recipe:
        from student.recipe.validate import with_same_classes

        loaded = load_recipe(recipe, settings, over())
        return with_same_classes(loaded) if same_classes else loaded

    if "RANK" not in os.environ:  # told before torch is imported; under torchrun one rank tells it, below
        _require_val(chosen_recipe(), shards, val)

    from storage.store.store import Store
    from student.distributed import process_group, rank
    from student.training.setup import TrainConfig
    from student.training.train import train as run

    with process_group(device) as torch_device:
        config = TrainConfig(
            recipe=chosen_recipe(),
            shards=shards,
            val=val,
            out=out,
            store=Store.open(store) if store else None,
            device=str(torch_device),
            resume=resume,
            smoke=smoke,
        )
        with Console() as console:
            result = run(config, console)
        if rank():
            return
        top5 = f", top-5 {result['top5']:.2f} %" if result["top5"] is not None else ""
        averaged = f", averaged {result['ema_top1']:.2f} %" if "ema_top1" in result else ""
        score = "not scored"
        if result["top1"] is not None:
            best = f"(best {result['best_top1']:.2f} %{averaged})"
            score = f"top-1 {result['top1']:.2f} % {best}{top5} on {result['samples']} samples"
        show(result, [f"{'a smoke run, nothing was learned: ' if smoke else ''}{score}: {out}"], as_json)


def _require_val(recipe: Recipe, shards: Words, val: Words) -> None:
    """A usage error where validation shards are missing that the recipe needs.

    UserError where what was given as shards is none: it says how they are made, with validation shards.
    """
    if val:
        return
    from student.training.distiller import student_taps_of

    if "labels" in student_taps_of(recipe):
        from storage.shards.patterns import expand

        expand(shards)
        raise missing("val")
