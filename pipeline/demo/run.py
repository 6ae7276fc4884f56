"""The whole path on scikit-learn's handwritten digits, offline, in a few minutes on two cores.

1,797 digits become shards; a small CNN and a small ViT learn all labels and become the teachers; what they see in a
tenth of the training digits is precomputed; students learn from that tenth, taught and by themselves. What is printed
was measured in this run, also when a method does not win.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from storage.errors import UserError
from storage.memory import out_of_memory
from storage.store.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from pipeline.console import Console

SEEDS = (0, 1, 2)
VIEWS = 8
SIZE = 24  # of the view images; patches of 4 make a grid of 6
CNN_SIZE = 64  # of the CNN's input

_SHORT = ["student.drop_path_rate=0", "optim.lr=0.002", "model_ema_decay=null"]  # few updates
_PLAIN = "student.model=vit_tiny_patch16_224"
_VIT = [f"student.img_size={SIZE}", "student.patch_size=4", "student.embed_dim=64"]
_VIT += ["student.depth=4", "student.num_heads=4"]
_POLICY = "crop(0.125)"  # digits have no mirror images
_FRESH = f"stream.bank.policy={_POLICY}"
_BATCH = "stream.batch_size=64"
_CNN = ["student.model=resnet10t", f"student.img_size={CNN_SIZE}"]
_TEACHERS = {
    "cnn": [_FRESH, *_CNN, _BATCH, "optim.epochs=5", "optim.warmup_epochs=1"],
    "vit": [_FRESH, _PLAIN, *_VIT, _BATCH, "optim.epochs=40", "optim.warmup_epochs=5"],
}
# name -> what it is asked for
_TARGETS = {"cnn": ["activations,grid=6,codec=u8", "logits,codec=f16"], "vit": ["attention,codec=log8"]}
_OPTIMIZER = ["optim.opt_betas=null", "optim.weight_decay=0.05"]  # as the other recipes have it
_RECIPES = {
    "scratch": [_PLAIN],
    "deit-hard": ["student.model=deit_tiny_distilled_patch16_224"],
    "aal": [_PLAIN],
    "attention-distill": [_PLAIN, "student.global_pool=token", "losses.attention.layers=uniform", *_OPTIMIZER],
}
_STUDENT = [*_VIT, "stream.batch_size=32", "optim.epochs=80", "val_interval=8", "optim.warmup_epochs=5"]


def demo(out: Path, console: Console) -> dict[str, Any]:
    """Run it; the table as lines and as numbers.

    Raises:
        UserError: the extra `demo` is not installed, or the folder is in use.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: this folder is not empty; give a new one with --out")
    for package, name in (("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")):
        if find_spec(package) is None:
            raise UserError(f"the demo needs {name}: pip install -c constraints.txt -e '.[cpu,demo]'")

    from pipeline.demo import figures
    from storage.shards.pack import pack

    began = time.monotonic()
    console.say(f"1. digits as class folders in {out}/digits, packed into shards")
    _write_digits(out / "digits")
    packed = pack(str(out / "digits"), str(out / "shards" / "digits-{000000..000002}.tar"), val_fraction=0.25)
    tenth = pack(packed.train, str(out / "tenth" / "digits-000000.tar"), fraction=0.1)
    counts = {"all": packed.samples["train"], "tenth": tenth.samples["train"], "val": packed.samples["val"]}
    console.say(f"   {counts['all']} training digits, {counts['tenth']} of them in the tenth, {counts['val']} held out")

    console.say("2. a small CNN and a small ViT learn all training labels; they are the teachers")
    trainings = {
        name: partial(_top1, "scratch", settings, out=out / name, shards=packed.train, val=packed.val)
        for name, settings in _TEACHERS.items()
    }
    teacher_top1 = _trained(trainings, console)

    console.say(f"3. what they see in {VIEWS} views of the tenth, once, into {out}/store")
    store = _precomputed(out, tenth.train, console)

    console.say("4. students learn from the tenth: " + ", ".join(_RECIPES))
    runs = {recipe: [out / f"{recipe}-{seed}" for seed in SEEDS] for recipe in _RECIPES}
    data: dict[str, Any] = {"shards": tenth.train, "val": packed.val, "store": store}
    trainings = {
        run.name: partial(_top1, recipe, [*settings, *_STUDENT, f"seed={seed}"], out=run, **data)
        for recipe, settings in _RECIPES.items()
        for seed, run in zip(SEEDS, runs[recipe], strict=True)
    }
    top1 = _trained(trainings, console)
    table = {recipe: [top1[run.name] for run in folders] for recipe, folders in runs.items()}
    pictures = [out / "curves.png", out / "attention.png"]
    figures.curves(pictures[0], runs, teacher_top1)
    figures.attention(pictures[1], store, packed.val, {recipe: folders[0] for recipe, folders in runs.items()})
    seconds = time.monotonic() - began
    return {
        "table": _lines(table, teacher_top1, counts, seconds, [*pictures, out / "store"]),
        "top1": table,
        "teacher_top1": teacher_top1,
        "samples": counts,
        "pictures": [str(picture) for picture in pictures],
        "seconds": round(seconds, 1),
    }


def _write_digits(folder: Path) -> None:
    """Scikit-learn's 8×8 digits as PNGs of 24×24, one folder a class."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels * 15.9375).astype("uint8")).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        image.convert("RGB").save(folder / str(label) / f"{i:04d}.png")


def _top1(
    recipe: str, settings: Sequence[str], *, out: Path, shards: list[str], val: list[str], store: Store | None = None
) -> float:
    """Top-1 of a run in a process of its own: it has one thread, as small networks gain nothing by a second."""
    import torch

    from pipeline.recipes.loader import load_recipe
    from student.training.setup import TrainConfig
    from student.training.train import train

    torch.set_num_threads(1)
    loaded = load_recipe(recipe, [*_SHORT, *settings])
    return train(TrainConfig(recipe=loaded, shards=shards, val=val, out=out, store=store))["top1"] or 0.0


def _trained(trainings: Mapping[str, Callable[[], float]], console: Console) -> dict[str, float]:
    """Name -> top-1, of as many runs at a time as there are cores."""
    from dask.system import CPU_COUNT

    top1_by_name = {}
    with ProcessPoolExecutor(min(CPU_COUNT, len(trainings)), multiprocessing.get_context("spawn")) as pool:
        names = {pool.submit(training): name for name, training in trainings.items()}
        for future in as_completed(names):
            try:
                top1_by_name[names[future]] = top1 = future.result()
            except BrokenProcessPool:
                advice = "close other programs and run the same command again"
                raise UserError(f"a process that trained for the demo died: {out_of_memory(advice)}") from None
            console.say(f"   {names[future]}: top-1 {top1:.1f} %")
    return top1_by_name


def _precomputed(out: Path, shards: list[str], console: Console) -> Store:
    """The store with targets of both teachers."""
    from precompute.request import PrecomputeRequest
    from precompute.run import precompute
    from precompute.taps.target_spec import parse_target
    from precompute.teachers.teacher import find_teacher
    from storage.views.policy import policy
    from student.models.files import load_student

    store = Store.create(out / "store")
    for name, targets in _TARGETS.items():
        weights = out / name / "last.safetensors"
        _, about = load_student(weights)
        fed: dict[str, Any] = {"input_size": about.img_size, "mean": about.mean, "std": about.std}
        teacher = find_teacher(about.model, weights=str(weights), arguments=about.arguments, teacher_name=name, **fed)
        specs, views = [spec for target in targets for spec in parse_target(target)], policy(_POLICY, SIZE)
        request = PrecomputeRequest(shards=shards, teacher=teacher, targets=specs, policy=views, num_views=VIEWS)
        for failure in precompute(store, request, console).failures:
            raise UserError(failure.error)
    return store


def _lines(
    table: dict[str, list[float]], teachers: dict[str, float], counts: dict[str, int], seconds: float, paths: list[Path]
) -> list[str]:
    from scipy.stats import t

    saw = f"the students saw {counts['tenth']} labeled ones, in {VIEWS} stored views"
    lines = [
        "",
        f"top-1 on {counts['val']} held-out digits; {saw}",
        f"{'':18} {'mean':>6} {'dev.':>6}   seeds{'':13} over scratch",
    ]
    for recipe, values in table.items():
        each = "  ".join(f"{value:5.1f}" for value in values)
        line = f"{recipe:18} {statistics.mean(values):6.1f} {statistics.stdev(values):6.1f}   {each}"
        if recipe != "scratch":
            gains = [b - a for a, b in zip(table["scratch"], values, strict=True)]
            gain, error = statistics.mean(gains), statistics.stdev(gains) / len(gains) ** 0.5
            verdict = "" if abs(gain) > t.ppf(0.975, len(gains) - 1) * error else ": may be chance"
            line += f"   {gain:+.1f} ± {error:.1f}{verdict}"
        lines.append(line)
    lines += [
        f"{'teacher ' + name:18} {top1:6.1f}          (saw all {counts['all']} labels)"
        for name, top1 in teachers.items()
    ]
    lines += ["", "±: standard error. May be chance: seeds alone would differ so more often than once in twenty times"]
    return [*lines, "", f"{seconds:.0f} s in all. Look at", *(f"  {path}" for path in paths)]
