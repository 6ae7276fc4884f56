"""What codecs cost a student: the table of docs/study.md, "What codecs cost".

    python docs/codec_study.py --data FOLDER --weights FOLDER --out FOLDER [--seeds 3] [--epochs 20]

FOLDER of data holds cifar10-train-000000.tar and cifar10-test-000000.tar, FOLDER of weights
mobilenetv2_100_tf.safetensors and vit_tiny_patch16_224.safetensors. Everything is an ordinary command of the pipeline:
1,500 images in two `light` views, students of the small recipes, once for each codec and seed. What is finished is not
run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

MAPS = [f"activations,grid=8,codec={codec}" for codec in ("f32", "u8", "u4")]
TOKENS = [f"tokens,layers=12,codec={codec}" for codec in ("f32", "u8", "u4")]
# recipe -> its loss, its teacher, the loss's weight, words for precompute, its targets: the exact one first
METHODS: dict[str, tuple[str, str, float, list[str], list[str]]] = {
    "aal-small": (
        "aal",
        "mobilenetv2_100",
        2000,
        ["--weights", "mobilenetv2_100_tf.safetensors", "--teacher-arg", "pad_type=same"],
        MAPS,
    ),
    "feature-mse-small": (
        "features",
        "vit_tiny_patch16_224",
        0.1,
        ["--weights", "vit_tiny_patch16_224.safetensors"],
        TOKENS,
    ),
}


def pipeline(cwd: Path, *words: object) -> Any:
    """What a command gives, run in a folder."""
    command = [sys.executable, "-m", "pipeline", *map(str, words), "--json"]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout)


def prepare(data: Path, weights: Path, out: Path) -> dict[str, list[str]]:
    """Shards in `out`, and all targets in its store: recipe -> ids."""
    for name, source in (("train", "cifar10-train"), ("val", "cifar10-test")):
        if not (out / f"{name}.tar").exists():
            (out / f"{name}.tar").symlink_to(data / f"{source}-000000.tar")
    views = ["--view-policy", "light", "--view-size", 32, "--num-views", 2, "--mean", 0.5, "--std", 0.5]
    targets = {}
    for recipe, (_, teacher, _, words, wanted) in METHODS.items():
        words = [str(weights / word) if word.endswith(".safetensors") else word for word in words]
        asked = [part for target in wanted for part in ("--target", target)]
        where = ["--shards", "train.tar", "--store", "S", "--input-size", 128, "--provider", "cpu", *views]
        targets[recipe] = pipeline(out, "precompute", "--teacher", teacher, *words, *asked, *where)["targets"]
    return targets


def accuracy(out: Path, recipe: str, target: str, epochs: int, seed: int) -> float:
    """Top-1 of a student, %."""
    run, (loss, _, weight, *_) = out / "runs" / f"{target}-{seed}", METHODS[recipe]
    if not (run / "result.json").exists():
        chosen = [f"losses.{loss}.target={target}", f"seed={seed}", f"optim.epochs={epochs}"]
        chosen += [f"val_interval={epochs}", "student.num_classes=10", "precision.amp_dtype=auto"]
        chosen += ["stream.batch_size=32", "student.drop_path_rate=0", f"losses.{loss}.weight={weight:g}"]
        settings = [part for setting in chosen for part in ("--set", setting)]
        settings += ["--resume"] if (run / "checkpoint.pt").exists() else []
        where = ["--store", "S", "--shards", "train.tar", "--val", "val.tar", "--out", run.relative_to(out)]
        pipeline(out, "train", "--recipe", recipe, *where, *settings)
        print(target, seed, json.loads((run / "result.json").read_text())["top1"], flush=True)
    return float(json.loads((run / "result.json").read_text())["top1"])


def main() -> None:
    """Run what is missing, and print the table."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "weights", "out"):
        words.add_argument(f"--{name}", type=Path, required=True)
    words.add_argument("--epochs", type=int, default=20)
    words.add_argument("--seeds", type=int, default=3)
    chosen = words.parse_args()
    out = chosen.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    targets = prepare(chosen.data.resolve(), chosen.weights.resolve(), out)
    known = pipeline(out, "inspect", "--store", "S")["targets"]
    top1: dict[str, list[float]] = {id: [] for ids in targets.values() for id in ids}
    for seed in range(chosen.seeds):  # seed by seed: what is there when it is cut off is whole
        for recipe, ids in targets.items():
            for id in ids:
                top1[id].append(accuracy(out, recipe, id, chosen.epochs, seed))
    print(
        "\n| target | bytes a view | error | cosine | loss, gradient cosine | top-1 | minus `f32` |\n"
        + "|---" * 7
        + "|"
    )
    for ids in targets.values():
        for id in ids:
            codec = next(c for c in ("f32", "u8", "u4") if f"-{c}-" in id)
            about, paired = known[id], [own - exact for own, exact in zip(top1[id], top1[ids[0]], strict=True)]
            error = about["codec_errors"][codec]
            figures = [f"{about['bytes'] / about['view_images']:,.0f}", f"{100 * error['relative']:.2f} %"]
            figures += [f"{error['cosine']:.5f}"]
            figures += [f"{100 * error['loss_error']:.2f} %, {error['gradient_cosine']:.5f}"]
            figures += [f"{mean(top1[id]):.1f} ± {stdev(top1[id]):.1f}"]
            figures += [f"{mean(paired):+.1f} ± {stdev(paired):.1f}" if id != ids[0] else ""]
            print(f"| {id} | {' | '.join(figures)} |")


if __name__ == "__main__":
    main()
