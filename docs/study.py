"""The study of docs/study.md: each method beside itself with permuted and with mean targets, and beside scratch.

    python docs/study.py --data FOLDER --weights FOLDER --out FOLDER [--seeds 3] [--epochs 12]

FOLDER of data holds cifar10-train-00000{0,1}.tar and cifar10-test-000000.tar, FOLDER of weights
mobilenetv2_100_tf.safetensors and vit_tiny_patch16_224.safetensors. Everything is an ordinary command of the pipeline;
what is finished is not run again. Two runs of one thread each go on at once.
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
STUDENT = [
    "student.model=vit_tiny_patch16_224", "student.img_size=32", "student.patch_size=4", "student.embed_dim=128",
    "student.depth=6", "student.num_heads=4", "student.drop_path_rate=0.1", "stream.batch_size=128", "optim.lr=0.001",
    "optim.warmup_epochs=2", "optim.weight_decay=0.05", "ema=null", "speed.amp=bfloat16", "speed.attention=unfused",
]  # fmt: skip
TUNING = 8  # epochs of the runs that choose a loss's weight
MATCH = ["layers=uniform", "heads=mean", "grid=bicubic"]


@dataclass(frozen=True)
class Method:
    """A recipe with one loss of a teacher, and the weights that are tried."""

    recipe: str
    loss: str
    weights: tuple[float, ...]
    settings: tuple[str, ...] = ()


METHODS = {
    "AAL": Method("aal", "aal", (200, 700, 2000), ("losses.aal.weight.decay=1", "losses.aal.weight.then={}")),
    "ADViT L1": Method(
        "advit-l1", "advit", (0.1, 0.5, 2), ("losses.advit.layers=uniform", "losses.advit.grid=bicubic")
    ),
    "attention distillation": Method(
        "attention-distill", "attention", (0.03, 0.1, 0.5), tuple(f"losses.attention.{m}" for m in MATCH)
    ),
    "DeiT hard": Method("deit-hard", "deit", (0.25, 1, 4), ("losses.deit.teacher=TEACHER",)),
    "DeiT soft": Method("deit-soft", "deit", (0.5, 2, 8), ("losses.deit.teacher=TEACHER", "losses.deit.reduce=batch")),
}
# Labels count the same everywhere, and students classify on the class token.
SAME = ["losses.crossentropy.weight=1", "losses.crossentropy.smoothing=0.1", "student.global_pool=token",
        "optim.lr_base_size=512", "optim.betas=null", "optim.min_lr=1e-5"]  # fmt: skip
CONTROLS = {"": [], "permuted": ["control.permute_targets=1"], "mean": ["control.mean_targets=true"]}


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
        cnn = ["--weights", self.weights / "mobilenetv2_100_tf.safetensors", "--teacher-arg", "pad_type=same",
               "--input-size", 128]  # fmt: skip
        vit = ["--weights", self.weights / "vit_tiny_patch16_224.safetensors"]
        every_other = "layers=2+4+6+8+10+12"
        wanted = [
            ["--teacher", "mobilenetv2_100", "--as", "mobilenetv2", *cnn, "--target", "activations,grid=8"],
            ["--teacher", "vit_tiny_patch16_224", "--as", "vit", *vit, "--target", f"class_row,{every_other}",
             "--target", "class_token"],
            ["--teacher", "vit_tiny_patch16_224", "--as", "vit128", *vit, "--input-size", 128,
             "--target", f"attention,{every_other},codec=log8"],
        ]  # fmt: skip
        for words in wanted:
            self.precompute(words, [*self.final, self.tune])
        fitted = {}
        for name, shards, val in (("final", self.final, self.test), ("tune", [self.tune], self.held)):
            path = self.out / f"teacher-{name}.safetensors"
            about = path.with_suffix(".json")
            if not about.exists():
                token = next(
                    t for t in self.pipeline("inspect", "--store", self.store)["targets"] if "class_token" in t
                )
                words = [part for shard in shards for part in ("--shards", shard)]
                result = self.pipeline("fit-teacher", "--store", self.store, "--target", token, *words, "--val", val,
                                       "--out", path)  # fmt: skip
                about.write_text(json.dumps(result))
            fitted[name] = json.loads(about.read_text())
            self.precompute(["--teacher", "vit_tiny_patch16_224", "--as", f"fitted_{name}", "--weights", path,
                             "--teacher-arg", "num_classes=10", "--target", "logits"], shards)  # fmt: skip
        return fitted

    def precompute(self, words: list[object], shards: list[Path]) -> None:
        """The targets that are missing."""
        each = [part for shard in shards for part in ("--shards", shard)]
        print("precompute", *words[1:4], flush=True)
        self.pipeline("precompute", *words, *each, "--store", self.store, "--mean", 0.5, "--std", 0.5, "--view-policy",
                      "deit", "--view-size", 32, "--view-count", 4, "--provider", "cpu")  # fmt: skip

    # ------------------------------------------------------------------------------------------ runs

    def train(self, name: str, recipe: str, settings: list[str], seed: int, tuning: bool) -> dict[str, Any]:
        """One run's result; it is not run again where it is there."""
        out = self.out / ("tuning" if tuning else "runs") / f"{name.replace(' ', '-')}-{seed}"
        if (out / "result.json").exists():
            return json.loads((out / "result.json").read_text())
        shards, val = ([self.tune], self.held) if tuning else (self.final, self.test)
        epochs = TUNING if tuning else self.epochs
        every = [*STUDENT, *SAME, f"optim.epochs={epochs}", f"val_interval={epochs}", f"seed={seed}"]
        words = [part for shard in shards for part in ("--shards", shard)]
        words += [part for s in (*every, *settings) for part in ("--set", s)]
        store = [] if "fresh" in name else ["--store", self.store]
        resume = ["--resume"] if (out / "checkpoint.pt").exists() else []
        began = time.monotonic()
        result = self.pipeline("train", "--recipe", recipe, *store, "--val", val, "--out", out, *words, *resume)
        print(f"{name}, seed {seed}: {result['top1']:.2f} %, {time.monotonic() - began:.0f} s", flush=True)
        return result

    def of(self, name: str, method: Method, control: str, weight: float, tuning: bool) -> tuple[str, str, list[str]]:
        """Name, recipe and settings of a run."""
        settings = [s.replace("TEACHER", f"fitted_{'tune' if tuning else 'final'}") for s in method.settings]
        said = f"losses.{method.loss}.weight.start={weight:g}"
        label = " ".join(part for part in (name, control, f"{weight:g}" if tuning else "") if part)
        return label, method.recipe, [*settings, said, *CONTROLS[control]]

    def scores(self, many: list[tuple[str, str, list[str]]], seeds: range, tuning: bool) -> dict[str, list[float]]:
        """Name -> top-1 of each seed."""
        with ThreadPoolExecutor(2) as pool:  # seed by seed: what is there when it is cut off is whole
            made = {
                (name, seed): pool.submit(self.train, name, recipe, settings, seed, tuning)
                for seed in seeds
                for name, recipe, settings in many
            }
            return {name: [made[name, seed].result()["top1"] for seed in seeds] for name, _, _ in many}

    def run(self) -> dict[str, Any]:
        """Everything, and what came out."""
        began = time.monotonic()
        fitted = self.prepare()
        trials = [(n, c, w) for n, method in METHODS.items() for c in CONTROLS for w in method.weights]
        named = {trial: self.of(trial[0], METHODS[trial[0]], trial[1], trial[2], True) for trial in trials}
        tuned = self.scores(list(named.values()), range(1), True)
        best = {
            (n, c): max(METHODS[n].weights, key=lambda w, n=n, c=c: tuned[named[n, c, w][0]][0])
            for n in METHODS
            for c in CONTROLS
        }
        many = [("scratch fresh", "scratch", ["stream.bank.policy=deit"]), ("scratch stored", "scratch", [])]
        many += [self.of(n, METHODS[n], c, best[n, c], False) for n in METHODS for c in CONTROLS]
        scores = self.scores(many, range(self.seeds), False)
        return {"fitted": fitted, "tuned": tuned, "best": {f"{n} {c}".strip(): w for (n, c), w in best.items()},
                "scores": scores, "hours": (time.monotonic() - began) / 3600}  # fmt: skip


def constant_losses(study: Study) -> dict[str, float]:
    """Method -> the loss of the best answer that is the same for every image, over the training views.

    A student whose loss is not below it has learned nothing of the image from its targets. Cross-entropy and KL are
    least at the mean of the targets, L1 at their median at each place, AAL at the mean of the normalised maps.
    """
    import torch

    from storage.store import Store
    from student.align import Shape
    from student.lesson import given_of
    from student.loss_settings import Matched
    from student.losses import advit, attention_transfer
    from student.losses.advit import distance
    from student.losses.attention_transfer import distillation
    from student.reader import BlockReader
    from student.rows import Rows
    from student.stream import Stream

    store, shape = Store.open(study.store), Shape(6, 4, 8, ("class",))
    tap = {m["identity"]["tap"]: id for id, m in store.targets().items() if m["teacher"] != "fitted_tune"}

    def targets(id: str) -> Any:
        stream = Stream([str(path) for path in study.final], batch=1, lanes=1, store=store, targets=[id])
        reader = BlockReader(stream.source)
        for segment in stream.order.blocks:
            for view in range(stream.views or 0):
                arrays = reader.targets(segment, view)[id]
                yield stream.source.targets[id].decode({n: torch.from_numpy(a) for n, a in arrays.items()})

    def rows(id: str, settings: Matched, which: Any) -> list[torch.Tensor]:
        met = Rows("it", settings, shape, [given_of(store, id)], which)
        return [met.teacher_rows([values]) for values in targets(id)]

    found = {}
    total, count = 0, 0
    for values in targets(tap["activations"]):
        maps = values.flatten(2)
        total, count = (
            total + (maps / (maps.norm(dim=-1, keepdim=True) + 1e-12)).sum(0, dtype=torch.float64),
            count + len(maps),
        )
    found["AAL"] = float((2 - 2 * (total / count).norm(dim=-1)).mean() / maps.shape[-1])
    class_rows = torch.cat(rows(tap["class_row"], advit.Settings(layers="uniform", grid="bicubic"), "class"))
    middle = class_rows.median(0, keepdim=True).values
    found["ADViT L1"] = float(distance(middle, class_rows, 1))
    maps = torch.cat(
        rows(tap["attention"], attention_transfer.Settings(layers="uniform", heads="mean", grid="bicubic"), "all")
    )
    average = maps.mean(0, keepdim=True)
    found["attention distillation"] = float(distillation(average.expand(maps.shape), maps))
    logits = torch.cat(list(targets(tap["logits"])))
    hard, soft = torch.bincount(logits.argmax(1), minlength=10) / len(logits), logits.softmax(1)
    entropy = lambda p: -(p * p.clamp_min(1e-30).log()).sum(-1)  # noqa: E731
    found["DeiT hard"] = float(entropy(hard))
    found["DeiT soft"] = float(entropy(soft.mean(0)) - entropy(soft).mean())
    return found


def last_losses(study: Study) -> dict[str, float]:
    """Method -> its loss over the last epoch, mean over the seeds."""
    found = {}
    for name, method in METHODS.items():
        logs = [study.out / "runs" / f"{name.replace(' ', '-')}-{seed}" / "log.jsonl" for seed in range(study.seeds)]
        lines = [json.loads(log.read_text().splitlines()[-1]) for log in logs]
        found[name] = mean(line["losses"][method.loss] for line in lines)
    return found


def paired(a: list[float], b: list[float]) -> str:
    """Mean difference ± its standard error."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return f"{mean(differences):+.2f} ± {error:.2f}"


def table(found: dict[str, Any]) -> str:
    """The table as Markdown."""
    scores = found["scores"]
    base = scores["scratch stored"]
    lines = ["| run | weight | top-1, % | − scratch stored | − permuted | − mean |", "|---|---|---|---|---|---|"]
    for name, values in scores.items():
        method = next((m for m in METHODS if name == m), None)
        spread = f"{mean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"
        cells = [name, f"{found['best'][name]:g}" if name in found["best"] else "", spread]
        cells.append("" if values is base else paired(values, base))
        cells += [paired(values, scores[f"{name} {c}"]) if method else "" for c in ("permuted", "mean")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing and print the table."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "weights", "out"):
        words.add_argument(f"--{name}", type=Path, required=True)
    words.add_argument("--epochs", type=int, default=12)
    words.add_argument("--seeds", type=int, default=3)
    said = words.parse_args()
    study = Study(said.data, said.weights, said.out, said.epochs, said.seeds)
    found = study.run() | {"constant": constant_losses(study), "last": last_losses(study)}
    (said.out / "study.json").write_text(json.dumps(found, indent=1))
    print(f"\n{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {found['hours']:.1f} h\n")
    print(table(found))
    print("\n| method | its loss, last epoch | of the best constant |\n|---|---|---|")
    for name, value in found["last"].items():
        print(f"| {name} | {value:.4f} | {found['constant'][name]:.4f} |")


if __name__ == "__main__":
    main()
