"""The whole path on scikit-learn's handwritten digits, offline, in a few minutes on two cores.

1,797 digits become shards; a small CNN is trained on all labels and becomes the teacher; its activations are
precomputed over a tenth of the training digits; students learn from that tenth, with the teacher's maps and without.
What is printed was measured in this run, also when the method does not win.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

from pipeline.console import Console
from storage.errors import UserError
from storage.progress import Quiet

SEEDS = (0, 1, 2)
VIEWS = 8
SIZE = 24  # of the students' views; patches of 4 make a grid of 6
TEACHER_SIZE = 64

_STUDENT = [
    "student.model=vit_tiny_patch16_224", f"student.img_size={SIZE}", "student.patch_size=4", "student.embed_dim=64",
    "student.depth=4", "student.num_heads=4", "student.drop_path_rate=0", "stream.batch_size=32", "optim.epochs=100",
    "val_interval=100", "optim.warmup_epochs=5", "optim.lr=0.002",
]  # fmt: skip
_TEACHER = [
    "student.model=resnet10t", f"student.img_size={TEACHER_SIZE}", "student.drop_path_rate=0", "stream.batch_size=64",
    "optim.epochs=5", "val_interval=5", "optim.warmup_epochs=1", "optim.lr=0.002",
]  # fmt: skip


def demo(out: Path, console: Console) -> dict[str, Any]:
    """Run it; the table as lines and as numbers.

    Raises:
        UserError: the extra `demo` is not installed, or the folder is in use.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: there is something in this folder already; give a new one with --out")
    try:
        import sklearn.datasets as _  # noqa: F401
    except ImportError:
        raise UserError("the demo needs scikit-learn: pip install -c constraints.txt -e '.[cpu,demo]'") from None

    from precompute import teachers
    from precompute.run import Wanted, precompute
    from precompute.targets import parse
    from storage.pack import pack
    from storage.policies import policy
    from storage.store import Store

    began = time.monotonic()
    step = _Steps(console)
    step(f"digits as class folders in {out}/digits, packed into shards")
    _write_digits(out / "digits")
    packed = pack(str(out / "digits"), str(out / "shards" / "digits-{000000..000002}.tar"), val_fraction=0.25)
    tenth = pack(packed["train"], str(out / "tenth" / "digits-000000.tar"), fraction=0.1)
    counts = {"all": packed["samples"]["train"], "tenth": tenth["samples"]["train"], "val": packed["samples"]["val"]}
    console.say(f"   {counts['all']} training digits, {counts['tenth']} of them in the tenth, {counts['val']} held out")

    step("a small CNN learns all training labels; it is the teacher")
    teacher = _train("scratch", _TEACHER, packed["train"], packed["val"], out / "teacher", None, 0)
    console.say(f"   teacher top-1 {teacher['top1']:.1f} %")

    step(f"the teacher's activation maps over {VIEWS} views of the tenth, once, into {out}/store")
    store = Store.create(out / "store")
    found = teachers.find(
        "resnet10t", weights=str(out / "teacher" / "last.safetensors"), arguments={"num_classes": 10},
        input_size=TEACHER_SIZE, mean=(0.5,), std=(0.5,),
    )  # fmt: skip
    wanted = Wanted(
        tenth["train"],
        found,
        parse("activations,grid=6,codec=u8"),
        policy("crop(0.125)", SIZE),
        frozenset({"line"}),
        VIEWS,
    )
    precompute(store, wanted, console)

    table: dict[str, list[float]] = {"scratch": [], "aal": []}
    for seed in SEEDS:
        for recipe in table:
            step(f"student by {recipe}, seed {seed}, on the tenth")
            run = _train(recipe, _STUDENT, tenth["train"], packed["val"], out / f"{recipe}-{seed}", store, seed)
            table[recipe].append(run["top1"])
            console.say(f"   top-1 {run['top1']:.1f} %")
    seconds = time.monotonic() - began
    lines = _lines(table, teacher["top1"], counts, seconds, out)
    return {
        "table": lines,
        "top1": table,
        "teacher_top1": teacher["top1"],
        "samples": counts,
        "seconds": round(seconds, 1),
    }


class _Steps:
    def __init__(self, console: Console) -> None:
        self.console, self.number = console, 0

    def __call__(self, text: str) -> None:
        self.number += 1
        self.console.say(f"{self.number}. {text}")


def _write_digits(folder: Path) -> None:
    """Scikit-learn's 8×8 digits as PNGs of 24×24, one folder a class."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels * 15.9375).astype("uint8")).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        image.convert("RGB").save(folder / str(label) / f"{i:04d}.png")


def _train(
    recipe: str, settings: list[str], shards: list[str], val: list[str], out: Path, store: Any, seed: int
) -> dict[str, Any]:
    from pipeline.recipes import load
    from student.train import Job, train

    return train(Job(load(recipe, [*settings, f"seed={seed}"]), shards, val, out, store), Quiet())


def _lines(
    table: dict[str, list[float]], teacher: float, counts: dict[str, int], seconds: float, out: Path
) -> list[str]:
    lines = [
        "",
        f"top-1 on {counts['val']} held-out digits; they saw {counts['tenth']} labelled ones, in {VIEWS} stored views",
        f"{'':10} {'mean':>6} {'dev.':>6}   seeds",
    ]
    for recipe, values in table.items():
        each = "  ".join(f"{value:5.1f}" for value in values)
        lines.append(f"{recipe:10} {statistics.mean(values):6.1f} {statistics.stdev(values):6.1f}   {each}")
    lines.append(f"{'teacher':10} {teacher:6.1f}          (a CNN that saw all {counts['all']} labels)")
    gains = [b - a for a, b in zip(table["scratch"], table["aal"], strict=True)]
    error = statistics.stdev(gains) / len(gains) ** 0.5
    verdict = "more than its error" if statistics.mean(gains) > 2 * error else "no more than chance could give"
    lines += [
        f"aal minus scratch: {statistics.mean(gains):+.1f} points, standard error {error:.1f}: {verdict}",
        "",
        f"{seconds:.0f} s in all. Look around: pipeline inspect --store {out / 'store'}",
    ]
    return lines
