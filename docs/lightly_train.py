"""Compare lightly-train with this package on the same work, in turns; docs/benchmarks.md shows the figures.

A ViT-S/14 with random weights (speed does not depend on them) teaches a ViT-Ti on photos without labels, at 112x112 in
batches of 64: lightly-train by its method `distillation`, which reads the teacher's patch features, this package by the
loss `features` on the teacher's last tokens, recorded once in two views of each photo.

Usage: python docs/lightly_train.py PHOTOS PYTHON [--precision float32|bfloat16] [--rounds 3]

PHOTOS is a folder of photos, PYTHON the interpreter of an environment that has `lightly-train` and `timm`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EPOCHS = (1, 3)  # what the second takes beyond the first, ÷ 2, is an epoch

THEIRS = """
import sys
import lightly_train

if __name__ == "__main__":
    lightly_train.pretrain(
        out=sys.argv[1],
        data=sys.argv[2],
        model="timm/vit_tiny_patch16_224",
        model_args={"img_size": 112},
        method="distillation",
        method_args={"teacher": "dinov2/vits14-notpretrained"},
        epochs=int(sys.argv[3]),
        batch_size=64,
        precision=sys.argv[4],
        transform_args={"image_size": (112, 112)},
    )
"""

RECIPE = """
student: {model: vit_tiny_patch16_224, img_size: 112}
losses:
  features: {layers: last, projection: linear, grid: bicubic}
optim: {lr_base: 0.0005}
stream: {batch_size: 64}
"""

Cost = tuple[float, float]  # seconds, peak memory in GiB


def run(words: list[str]) -> Cost:
    """Run a command to its end; what it took. Its output is shown only where it fails."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            output.seek(0)
            sys.exit(f"{' '.join(words)} failed:\n{output.read().decode()[-4000:]}")
    return time.monotonic() - began, usage.ru_maxrss / 2**20  # Linux counts in KiB


def theirs(folder: Path, photos: str, python: str, precision: str) -> dict[str, Cost]:
    """lightly-train: one call."""
    script = folder / "theirs.py"
    script.write_text(THEIRS)
    return {
        f"{epochs} epochs": run([python, str(script), str(folder / f"theirs-{epochs}"), photos, str(epochs), precision])
        for epochs in EPOCHS
    }


def ours(folder: Path, photos: str, precision: str) -> dict[str, Cost]:
    """This package: pack, precompute, train."""
    recipe, shards, store = folder / "recipe.yaml", str(folder / "photos.tar"), str(folder / "store")
    recipe.write_text(RECIPE)
    pipeline = [sys.executable, "-m", "pipeline"]
    done = {"pack": run([*pipeline, "pack", photos, shards])}
    views = ["--view-policy", "light", "--view-size", "112", "--num-views", "2"]
    teacher = ["--teacher", "vit_small_patch14_dinov2", "--weights", "random:0", "--input-size", "112"]
    words = ["precompute", *teacher, *views, "--shards", shards, "--store", store, "--target", "tokens,layers=last"]
    done["precompute"] = run([*pipeline, *words])
    for epochs in EPOCHS:
        out = str(folder / f"ours-{epochs}")
        words = ["train", "--recipe", str(recipe), "--store", store, "--shards", shards, "--out", out]
        done[f"{epochs} epochs"] = run(
            [*pipeline, *words, "--set", f"optim.epochs={epochs}", "--set", f"precision.amp_dtype={precision}"]
        )
    return done


def main() -> None:
    """Both, in turns; medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos")
    parser.add_argument("python")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    wanted = parser.parse_args()
    their_precision, our_precision = {"float32": ("32-true", "none"), "bfloat16": ("bf16-mixed", "bfloat16")}[
        wanted.precision
    ]
    rounds: list[dict[str, dict[str, Cost]]] = []
    for _ in range(wanted.rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            costs = {
                "lightly-train": theirs(folder, wanted.photos, wanted.python, their_precision),
                "this package": ours(folder, wanted.photos, our_precision),
            }
            rounds.append(costs)
            size = sum(path.stat().st_size for path in (folder / "store").rglob("*") if path.is_file())
        print(json.dumps(costs), file=sys.stderr)
    print(f"precision {wanted.precision}; medians of {wanted.rounds} rounds; store {size:,} bytes")
    first, last = (f"{epochs} epochs" for epochs in EPOCHS)
    for who in rounds[0]:
        of_each = [costs[who] for costs in rounds]
        epoch = statistics.median((of[last][0] - of[first][0]) / (EPOCHS[1] - EPOCHS[0]) for of in of_each)
        before = statistics.median(sum(of[step][0] for step in of if "epochs" not in step) for of in of_each)
        student = statistics.median(of[first][0] for of in of_each) + before
        peak = max(peak for of in of_each for _, peak in of.values())
        print(
            f"{who}: {before:.1f} s before training, {epoch:.1f} s an epoch, {student:.1f} s until a student of one "
            f"epoch, peak {peak:.2f} GiB"
        )


if __name__ == "__main__":
    main()
