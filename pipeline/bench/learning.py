"""Bench of training: a step from the store ÷ with labels alone, and with the live teacher ÷ from the store."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch

from pipeline.bench.timing import Row, Spread, interleaved, ratios
from pipeline.bench.world import World
from precompute.export import live_teacher
from precompute.taps import Tap
from precompute.teachers import Teacher
from storage.codecs import Codec
from storage.progress import Progress
from storage.store import Store
from student.config import Recipe, validate
from student.optimiser import optimiser
from student.prepare import Job, prepare
from student.speed import Choice, apply, choose
from student.step import Update
from student.stream import Batch

GRID = {"layers": "uniform", "grid": "bicubic"}
# method -> (teacher, its losses)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "AAL": ("mobilenetv2_100", {"aal": {}}),
    "class rows": ("vit_tiny_patch16_224", {"advit": GRID}),
}
PLAIN = "labels alone"
PIECE = 16  # images that a live teacher sees at a time
# case -> student, batch size, side of the view images, grid of its patches, samples in each of two shards
CASES: dict[str, tuple[dict[str, Any], int, int, int, int]] = {
    "6 layers of 128, 32x32": (
        {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4}, 128, 32, 8, 640,
    ),
    "DeiT-Tiny, 224x224": ({"model": "deit_tiny_patch16_224"}, 32, 224, 14, 128),
}  # fmt: skip


class _Steps:
    """Training steps of one recipe, one at a time, over epoch after epoch; with a live teacher if one is given."""

    def __init__(self, world: World, store: Store, shards: list[str], recipe: Recipe, teacher: Teacher | None) -> None:
        job = Job(recipe, shards, shards, world.folder / "unused", store, world.device)
        parts = prepare(job, world.quiet, None)
        self.lesson, self.stream = parts.lesson.train(), parts.stream
        optimizer, _ = optimiser(recipe, self.lesson, self.stream.order.steps)
        self.device = torch.device(world.device)
        self.update = Update(recipe, self.lesson, optimizer, None, self.device, False)
        self.epoch = self.step = 0
        self.batches = self.stream.epoch(0)
        self.live = {}
        if teacher is not None:
            for target in self.stream.source.targets:
                identity = store.target(target)["identity"]
                tap = Tap(identity["tap"], tuple(identity["layers"]), identity["grid"])
                module = live_teacher(teacher, [tap], self.stream.source.policy.size)
                self.live[target] = module.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def batch(self) -> Batch:
        """The next one, of the next epoch after the last."""
        batch = next(self.batches, None)
        if batch is None:
            self.epoch += 1
            self.batches = self.stream.epoch(self.epoch)
            batch = next(self.batches)
        return batch.to(self.device)

    def __call__(self) -> float:
        """Seconds of a step, loader included."""
        began = time.perf_counter()
        batch = self.batch()
        if self.live:
            with torch.inference_mode():
                pieces = torch.split(batch.images, PIECE)  # on a CPU whole batches are slower
                now = {t: torch.cat([teacher(piece)[0] for piece in pieces]) for t, teacher in self.live.items()}
            exact = {target: Codec("f32", tuple(values.shape[1:]), 1) for target, values in now.items()}
            # A copy: tensors of inference mode take no part in gradients.
            batch = dataclasses.replace(
                batch, targets={t: {"data": values.clone()} for t, values in now.items()}, codecs=exact
            )
        self.step += 1
        self.update(batch, 0, self.step)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - began


def steps(world: World, cases: list[str], turns: int, live: bool, progress: Progress) -> list[Row]:
    """(3) A step from the store ÷ one with labels alone; (4) with `live`, one with the live teacher ÷ from the store.

    Each in f32, and as `speed: auto` computes here where that is something else.
    """
    rows = []
    for case in cases:
        student, size, side, grid, samples = CASES[case]
        shards = world.small(samples, side, "png" if side < 100 else "jpg")
        store = world.store(f"steps-{side}")
        teachers = {}
        for method, (model, _) in METHODS.items():
            teachers[method] = world.teacher(model)
            target = f"activations,grid={grid},codec=u8" if method == "AAL" else "class_row,codec=f16"
            world.recorded(store, shards, teachers[method], [target], side)
        recipes = {
            method: validate(
                {"student": student, "losses": {"crossentropy": {}, **losses}, "ema": None,
                 "stream": {"batch_size": size, "window": 1}}, "bench",
            )
            for method, (_, losses) in {PLAIN: ("", {}), **METHODS}.items()
        }  # fmt: skip
        made = {method: _Steps(world, store, shards, recipe, None) for method, recipe in recipes.items()}
        if live:
            for method in METHODS:
                made[f"{method}, live"] = _Steps(world, store, shards, recipes[method], teachers[method])
        for choice in _choices(made[PLAIN], recipes[PLAIN]):
            how = f"{choice.amp.replace('none', 'float32')}, {choice.attention} attention"
            progress.say(f"training, {case}, {how}")
            for one in made.values():
                apply(one.lesson, choice.amp, choice.attention)
            found = interleaved(made, turns, warm=3)
            about: dict[str, object] = {"ms": {name: round(1000 * Spread.of(v).median, 1) for name, v in found.items()}}
            for method in METHODS:
                where = f"{method}; {case}; {how}"
                price = ratios(found[method], found[PLAIN])
                rows.append(Row(3, where, "a step from the store ÷ with labels alone", price, 1.10, True, about))
                if live:
                    dear = ratios(found[f"{method}, live"], found[method])
                    rows.append(
                        Row(4, where, "a step with the live teacher ÷ from the store", dear, None, False, about)
                    )
    return rows


def _choices(plain: _Steps, recipe: Recipe) -> list[Choice]:
    """f32, and what `auto` chooses for the plain student if that is another precision."""
    auto = choose(plain.lesson, plain.batch(), recipe.speed, 1_000_000)
    f32 = choose(plain.lesson, plain.batch(), recipe.speed.model_copy(update={"amp": "none"}), 1_000_000)
    return [f32] if auto.amp == "none" else [f32, auto]
