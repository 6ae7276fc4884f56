"""The price of the student alone: a step with stored targets ÷ the same step with labels only, loader included."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from storage.policies import policy
from storage.store import Store
from storage.testing import synthetic_shards
from student.config import validate
from student.lesson import Lesson, find_targets
from student.model import build
from student.speed import apply
from student.stream import Stream
from tests.conftest import run_precompute, write_teacher

MATCH = {"layers": "uniform", "heads": "mean", "grid": "bicubic"}
CASES: dict[str, Any] = {
    "small student, 32x32": (
        {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4}, 128, 32, 8, 600,
    ),
    "DeiT-Tiny, 224x224": ({"model": "deit_tiny_patch16_224"}, 32, 224, 14, 200),
}  # fmt: skip


class Steps:
    """Training steps, one at a time, over epoch after epoch of a stream."""

    def __init__(self, shards: list[str], store: Store, recipe: Any, amp: str) -> None:
        torch.manual_seed(0)
        model, _ = build(recipe.student, 3)
        known = store.shard_ids()
        _, given = find_targets(store, [store.require(url, known).id for url in shards], recipe, model)
        ids = [one.id for several in given.values() for one in several]
        self.lesson = Lesson(recipe, model, given, (0.5,) * 3, (0.5,) * 3).train()
        apply(self.lesson, amp, "unfused")
        bank = next(iter(store.banks()))
        self.stream = Stream(shards, batch=recipe.stream.batch_size, store=store, targets=ids, bank=bank, window=1)
        self.optimizer = torch.optim.AdamW(self.lesson.parameters(), 1e-4)
        self.epoch = 0
        self.batches = self.stream.epoch(0)

    def __call__(self) -> float:
        began = time.perf_counter()
        batch = next(self.batches, None)
        if batch is None:
            self.epoch += 1
            self.batches = self.stream.epoch(self.epoch)
            batch = next(self.batches)
        _, values = self.lesson(batch)
        self.optimizer.zero_grad()
        self.lesson.total(values, 0).backward()
        self.optimizer.step()
        return time.perf_counter() - began


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["none", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_a_step_from_the_store_costs_little_more_than_one_without_a_teacher(
    tmp_path: Path, case: str, amp: str
) -> None:
    from precompute import teachers

    student, batch, size, grid, samples = CASES[case]
    shards = synthetic_shards(tmp_path / "data", shards=2, samples=samples)
    vit = ("vit_tiny_patch16_224", {"img_size": 128, "depth": 6})
    # As many maps as MobileNetV2 has, and ViT-Tiny's rows over 65 tokens; what the teachers are worth does not matter.
    cnn = ("resnet10t", {"channels": [64, 128, 200, 320], "stem_width": 8})
    made = {}
    for kind, (name, arguments) in {"cnn": cnn, "vit": vit}.items():
        weights = write_teacher(tmp_path / f"{kind}.safetensors", (name, arguments))
        teacher = teachers.find(
            name, weights=weights, arguments={**arguments, "num_classes": 3}, input_size=128, mean=(0.5,), std=(0.5,),
            called=kind,
        )  # fmt: skip
        wish = f"activations,grid={grid}" if kind == "cnn" else "class_row"
        options = {"policy": policy("light", size), "views": 2}
        made[kind] = run_precompute(tmp_path / "store", shards, teacher, [wish], **options)["targets"]
    store = Store.open(tmp_path / "store")
    rows = {key: value for key, value in MATCH.items() if key != "heads"}
    methods = {"plain": {}, "AAL": {"aal": {}}, "class rows": {"advit": rows}}
    contenders = {}
    for name, losses in methods.items():
        content = {"student": student, "losses": {"crossentropy": {}, **losses}, "stream": {"batch_size": batch}}
        contenders[name] = Steps(shards, store, validate(content, "it"), amp)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(34):
        for name, step in contenders.items():
            seconds = step()
            if turn >= 4:
                times[name].append(seconds)
    middle = {name: median(several) for name, several in times.items()}
    ratios = {name: middle[name] / middle["plain"] for name in ("AAL", "class rows")}
    print(
        f"\n{case}, {amp}: plain {1000 * middle['plain']:.0f} ms; "
        + ", ".join(f"{n} {r:.3f}" for n, r in ratios.items())
    )
    assert max(ratios.values()) < 1.25
