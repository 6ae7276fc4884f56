"""The study of docs/study.md: each method beside itself with permuted targets, and beside scratch.

    python docs/study.py --data FOLDER --weights FOLDER --out FOLDER [--seeds 2] [--epochs 20] [--only METHOD …]

FOLDER of data holds cifar10-train-00000{0,1}.tar and cifar10-test-000000.tar, FOLDER of weights
mobilenetv2_100_tf.safetensors and vit_tiny_patch16_224.safetensors. Everything is an ordinary command of the pipeline,
with the small variants of its recipes; what is finished is not run again. Two runs of one thread each go on at once.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
# Labels count the same everywhere, and all students classify on the class token.
LABELED = ["losses.crossentropy.weight=1", "losses.crossentropy.smoothing=0.1", "student.global_pool=token"]
SAME = [
    "optim.opt_betas=null",
    "optim.weight_decay=0.05",
    "optim.warmup_lr=1e-6",
    "optim.min_lr=1e-5",
    "precision.amp_dtype=auto",
    "precision.fused_attn=auto",
]
VIT = "vit_tiny_patch16_224"
EVERY_OTHER = "layers=2+4+6+8+10+12"
PERMUTED = "permuted"


@dataclass(frozen=True)
class Method:
    """A small recipe, its loss of a teacher, and the weights that are tried; without labels none is, and k-NN tells."""

    recipe: str
    loss: str | None
    weights: tuple[float, ...] = ()
    settings: tuple[str, ...] = ()
    labels: bool = True


METHODS = {
    "AAL": Method("aal-small", "aal", (200, 700, 2000)),
    "ADViT L1": Method("advit-l1-small", "advit", (0.02, 0.1, 0.5)),
    "attention distillation": Method("attention-distill-small", "attention", (0.03, 0.1, 0.3)),
    "attention copy": Method("attention-copy-small", None),
    "head-specific": Method(
        "head-specific-small", "head_specific", (0.03, 0.3, 3), ("losses.head_specific.layers=[[2,4],[4,8],[6,12]]",)
    ),
    "feature MSE": Method("feature-mse-small", "features", (0.02, 0.1, 0.5)),
    "DeiT hard": Method("deit-hard-small", "deit", (0.25, 1, 4), ("losses.deit.teacher=TEACHER",)),
    "DeiT soft": Method("deit-soft-small", "deit", (0.5, 2, 8), ("losses.deit.teacher=TEACHER",)),
    "AttnDistill": Method("attndistill-small", "alignment", labels=False),
    "SimReg": Method("simreg-small", "alignment", labels=False),
    "SEED": Method("seed-small", "seed", labels=False),
    "CompRess": Method("compress-small", "compress", labels=False),
}


@dataclass(frozen=True)
class Run:
    """A command of `pipeline train`, but for its seed and its shards."""

    name: str
    recipe: str
    settings: tuple[str, ...] = ()
    labels: bool = True
    tuning: bool = False


# What the methods stand beside. The second learns nothing: its features are those of an untrained network.
BASES = (
    Run("scratch", "scratch-small"),
    Run(
        "untrained",
        "simreg-small",
        ("optim.epochs=1", "optim.lr=1e-12", "optim.warmup_epochs=0", "optim.min_lr=0"),
        False,
    ),
)


class Study:
    """Folders, and commands with their results."""

    def __init__(self, data: Path, weights: Path, out: Path, epochs: int, seeds: int) -> None:
        self.data, self.weights, self.out = data.resolve(), weights.resolve(), out
        self.epochs, self.seeds = epochs, seeds
        self.store = out / "store"
        self.final = [out / "data" / f"cifar10-train-00000{n}.tar" for n in (0, 1)]
        self.test = out / "data" / "cifar10-test-000000.tar"
        self.tune, self.held = out / "tune" / "tune.tar", out / "tune" / "tune-val.tar"

    def pipeline(self, *words: object) -> Any:
        """What a command gives."""
        command = [sys.executable, "-m", "pipeline", *map(str, words), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
        return json.loads(done.stdout)

    # ------------------------------------------------------------------------------------------ targets

    def prepare(self) -> dict[str, Any]:
        """Shards, and all targets in one store; the accuracy of the fitted teachers."""
        for path in (*self.final, self.test):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.symlink_to(self.data / path.name)
        (self.test.parent / "classes.json").write_text(json.dumps(CLASSES))
        if not self.tune.exists():  # a fifth of the training images chooses the losses' weights
            self.pipeline("pack", self.out / "data" / "cifar10-train-*.tar", self.tune, "--val-fraction", 0.2)
        cnn = [
            "--weights",
            self.weights / "mobilenetv2_100_tf.safetensors",
            "--teacher-arg",
            "pad_type=same",
            "--input-size",
            128,
        ]
        vit = ["--weights", self.weights / "vit_tiny_patch16_224.safetensors"]
        small = [*vit, "--input-size", 128]  # its patches are the student's
        maps = f"attention,{EVERY_OTHER},codec=log8"
        wanted = [
            ["--teacher", "mobilenetv2_100", "--teacher-name", "mobilenetv2", *cnn, "--target", "activations,grid=8"],
            [
                "--teacher",
                VIT,
                "--teacher-name",
                "vit",
                *vit,
                "--target",
                f"class_row,{EVERY_OTHER}",
                "--target",
                "class_token",
            ],
            ["--teacher", VIT, "--teacher-name", "vit128", *small, "--target", maps],
            [
                "--teacher",
                VIT,
                "--teacher-name",
                "vit128",
                *small,
                "--target",
                "q,k,layers=4+8+12",
                "--target",
                "tokens,layers=12",
            ],
        ]
        for words in wanted:
            self.precompute(words, [*self.final, self.tune])
        copied = [
            "--teacher",
            VIT,
            "--teacher-name",
            "vit128",
            *small,
            "--target",
            maps,
        ]  # a student that copies is evaluated, too
        self.precompute(copied, [self.test, self.held], "eval", 1)
        fitted = {}
        for name, shards, val in (("final", self.final, self.test), ("tune", [self.tune], self.held)):
            path = self.out / f"teacher-{name}.safetensors"
            about = path.with_suffix(".json")
            if not about.exists():
                token = next(
                    t for t in self.pipeline("inspect", "--store", self.store)["targets"] if "class_token" in t
                )
                words = [part for shard in shards for part in ("--shards", shard)]
                result = self.pipeline(
                    "fit-teacher", "--store", self.store, "--target", token, *words, "--val", val, "--out", path
                )
                about.write_text(json.dumps(result))
            fitted[name] = json.loads(about.read_text())
            self.precompute(
                [
                    "--teacher",
                    VIT,
                    "--teacher-name",
                    f"fitted_{name}",
                    "--weights",
                    path,
                    "--teacher-arg",
                    "num_classes=10",
                    "--target",
                    "logits",
                ],
                shards,
            )
        return fitted

    def precompute(self, words: list[object], shards: list[Path], policy: str = "deit", count: int = 4) -> None:
        """The targets that are missing."""
        each = [part for shard in shards for part in ("--shards", shard)]
        print("precompute", *words[1:4], policy, flush=True)
        self.pipeline(
            "precompute",
            *words,
            *each,
            "--store",
            self.store,
            "--mean",
            0.5,
            "--std",
            0.5,
            "--view-policy",
            policy,
            "--view-size",
            32,
            "--num-views",
            count,
            "--provider",
            "cpu",
        )

    # ------------------------------------------------------------------------------------------ runs

    def train(self, run: Run, seed: int) -> float:
        """A run's top-1, or by k-NN where it needs no labels; it is not run again where it is there."""
        out = self.out / ("tuning" if run.tuning else "runs") / f"{run.name.replace(' ', '-')}-{seed}"
        shards, val = ([self.tune], self.held) if run.tuning else (self.final, self.test)
        words = [part for shard in shards for part in ("--shards", shard)]
        if not (out / "result.json").exists():
            every = [*SAME, f"optim.epochs={self.epochs}", f"val_interval={self.epochs}", f"seed={seed}"]
            every += [*(LABELED if run.labels else ()), *run.settings]
            also = [part for setting in every for part in ("--set", setting)] + (["--val", val] if run.labels else [])
            also += ["--resume"] if (out / "checkpoint.pt").exists() else []
            began = time.monotonic()
            self.pipeline("train", "--recipe", run.recipe, "--store", self.store, "--out", out, *words, *also)
            print(f"{run.name}, seed {seed}: {time.monotonic() - began:.0f} s", flush=True)
        if run.labels:
            return float(json.loads((out / "result.json").read_text())["top1"])
        if not (out / "knn.json").exists():
            train = [part for shard in shards for part in ("--train-shards", shard)]
            found = self.pipeline("evaluate", "knn", out, "--shards", val, *train, "--device", "cpu")
            (out / "knn.json").write_text(json.dumps(found))
        return float(json.loads((out / "knn.json").read_text())["knn"]["20"]["top1"])

    def of(self, name: str, control: str = "", weight: float | None = None, tuning: bool = False) -> Run:
        """A method's run."""
        method = METHODS[name]
        settings = [s.replace("TEACHER", f"fitted_{'tune' if tuning else 'final'}") for s in method.settings]
        settings += ["control.permute_targets=1"] if control else []
        settings += [f"losses.{method.loss}.weight={weight:g}"] if weight is not None else []
        label = " ".join(part for part in (name, control, f"{weight:g}" if tuning and weight else "") if part)
        return Run(label, method.recipe, tuple(settings), method.labels, tuning)

    def scores(self, many: list[Run], seeds: range) -> dict[str, list[float]]:
        """Name -> accuracy of each seed."""
        with ThreadPoolExecutor(2) as pool:  # seed by seed: what is there when it is cut off is whole
            made = {(run.name, seed): pool.submit(self.train, run, seed) for seed in seeds for run in many}
            return {run.name: [made[run.name, seed].result() for seed in seeds] for run in many}

    def run(self, names: list[str]) -> dict[str, Any]:
        """Everything, and what came out."""
        began = time.monotonic()
        fitted = self.prepare()
        best: dict[str, float] = {}
        trials = {(n, w): self.of(n, "", w, True) for n in names for w in METHODS[n].weights}
        tuned = self.scores(list(trials.values()), range(1))
        for n in names:
            if weights := METHODS[n].weights:
                best[n] = max(weights, key=lambda w, n=n: tuned[trials[n, w].name][0])
        many = list(BASES)
        many += [self.of(n, control, best.get(n)) for n in names for control in ("", PERMUTED)]
        scores = self.scores(many, range(self.seeds))
        return {
            "fitted": fitted,
            "tuned": tuned,
            "best": best,
            "scores": scores,
            "hours": (time.monotonic() - began) / 3600,
        }


def last_losses(study: Study, names: list[str]) -> dict[str, tuple[float, float]]:
    """Method -> its loss over the last epoch and that of its permuted self, means over the seeds.

    What a student with permuted targets cannot know is the image; a loss that is not below it has taught nothing of it.
    """

    def last(name: str, loss: str) -> float:
        logs = [study.out / "runs" / f"{name.replace(' ', '-')}-{seed}" / "log.jsonl" for seed in range(study.seeds)]
        return mean(json.loads(log.read_text().splitlines()[-1])["losses"][loss] for log in logs)

    losses = {name: METHODS[name].loss for name in names}
    return {n: (last(n, loss), last(f"{n} {PERMUTED}", loss)) for n, loss in losses.items() if loss}


def paired(a: list[float], b: list[float]) -> str:
    """Mean difference ± its standard error."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return f"{mean(differences):+.2f} ± {error:.2f}"


def table(found: dict[str, Any], labels: bool) -> str:
    """The methods that need labels, or those that need none, as Markdown."""
    scores = found["scores"]
    base = BASES[0 if labels else 1].name
    lines = [
        f"| method | weight | {'top-1' if labels else 'k-NN'}, % | permuted | − {base} | − permuted |",
        "|---|---|---|---|---|---|",
    ]

    def spread(values: list[float]) -> str:
        return f"{mean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"

    lines.append(f"| {base} | | {spread(scores[base])} | | | |")
    for name in (n for n in METHODS if n in scores and METHODS[n].labels == labels):
        own, other = scores[name], scores[f"{name} {PERMUTED}"]
        weight = f"{found['best'][name]:g}" if name in found["best"] else ""
        cells = [name, weight, spread(own), spread(other), paired(own, scores[base]), paired(own, other)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing and print the tables."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "weights", "out"):
        words.add_argument(f"--{name}", type=Path, required=True)
    words.add_argument("--epochs", type=int, default=20)
    words.add_argument("--seeds", type=int, default=2)
    words.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    said = words.parse_args()
    study = Study(said.data, said.weights, said.out, said.epochs, said.seeds)
    found = study.run(said.only) | {"last": last_losses(study, said.only)}
    (said.out / "study.json").write_text(json.dumps(found, indent=1))
    amps = {json.loads(path.read_text())["precision"]["amp_dtype"] for path in said.out.glob("*/*/result.json")}
    kinds = " and ".join(sorted(amps)).replace("none", "float32")
    machine = platform.processor() or platform.machine()
    print(f"\n{machine}, {os.cpu_count()} cores, {kinds}, {found['hours']:.1f} h\n")
    print(table(found, True), table(found, False), sep="\n\n")
    print("\n| method | its loss, last epoch | with permuted targets |\n|---|---|---|")
    for name, (own, other) in found["last"].items():
        print(f"| {name} | {own:.4f} | {other:.4f} |")


if __name__ == "__main__":
    main()
