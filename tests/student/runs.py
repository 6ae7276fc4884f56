"""What tests of the trainer share: small runs, what they leave, and commands that are killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from pipeline.recipes.loader import load_recipe
from storage.store.store import Store
from storage.testing import TINY_VIT
from student.training.setup import TrainConfig
from student.training.train import train
from tests.conftest import HANGS, ROOT, Quiet, World

STUDENT = [
    "student.model=vit_tiny_patch16_224",
    "student.img_size=32",
    "student.patch_size=4",
    "student.embed_dim=48",
    "student.depth=2",
    "student.num_heads=3",
    "student.drop_path_rate=0",
    "stream.batch_size=32",
    "optim.epochs=2",
    "optim.warmup_epochs=0",
    "optim.lr=0.002",
    "precision.amp_dtype=none",
    "precision.fused_attn=true",
]
POOLED = (TINY_VIT[0], {**TINY_VIT[1], "global_pool": "avg"})
# Everything that a checkpoint has to bring back.
FULL = [
    "student.drop_path_rate=0.2",
    "student.drop_rate=0.1",
    "model_ema_decay=0.9",
    "optim.layer_decay=0.8",
    "optim.clip_grad=1",
]


def job(world: World, out: Path, recipe: str, *settings: str, **changes: Any) -> TrainConfig:
    """A small run over the world's shards and store."""
    chosen = load_recipe(recipe, [*STUDENT, *settings])
    parts: dict[str, Any] = {"shards": world.shards, "val": world.shards, "store": Store.open(world.store)}
    return TrainConfig(recipe=chosen, out=out, **{**parts, **changes})


def run(world: World, out: Path, recipe: str, *settings: str, **changes: Any) -> dict[str, Any]:
    """What the run gave."""
    return {**train(job(world, out, recipe, *settings, **changes), Quiet())}


def u8(world: World) -> str:
    """The setting that chooses among the world's targets."""
    return f"losses.aal.target={world.targets['activations u8']}"


def weights(out: Path) -> dict[str, torch.Tensor]:
    """All tensors that a run left, by file and name."""
    from safetensors.torch import load_file

    return {f"{path.stem} {n}": t for path in sorted(out.glob("*.safetensors")) for n, t in load_file(path).items()}


def same(a: Path, b: Path) -> bool:
    """Whether two runs left the same weights, bit for bit, and the same log beside the times."""
    ours, theirs = weights(a), weights(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours) and log(a) == log(b)


def log(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's log, without the times."""
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def command(world: World, out: Path, recipe: str, *settings: str) -> list[str]:
    """The words of the same run for the command line."""
    words = ["train", "--recipe", recipe, "--out", str(out), "--store", str(world.store)]
    words += ["--shards", f"{world.folder}/data/shard-{{000000..000001}}.tar"]
    words += ["--val", f"{world.folder}/data/shard-{{000000..000001}}.tar"]
    return [*words, *[word for setting in (*STUDENT, *settings) for word in ("--set", setting)]]


def start(
    words: list[str], prefix: list[str] | None = None, environment: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    launcher = prefix or [sys.executable, "-m", "pipeline"]
    return subprocess.Popen(
        [*launcher, *words],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_for(condition: Any, process: subprocess.Popen[str]) -> None:
    """Until something is there; fails if the process ends before."""
    until = time.monotonic() + HANGS
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, "it takes too long"
        time.sleep(0.01)


def children(process: subprocess.Popen[str]) -> list[int]:
    """Ids of the processes that a process has started with multiprocessing, but for its resource tracker."""
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(id) for id in found if b"spawn_main" in Path(f"/proc/{id}/cmdline").read_bytes()]
