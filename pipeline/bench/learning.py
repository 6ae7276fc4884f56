"""Bench of training: a step from the store ÷ with labels alone, and with the live teacher ÷ from the store."""

from __future__ import annotations

import dataclasses
import itertools
import time
from typing import TYPE_CHECKING, Any

import torch

from pipeline.bench.timing import Measure, Spread, Turns, interleaved, ratios
from precompute.taps import Tap
from storage.store.codecs import Codec
from student.data.stream import Stream
from student.recipe.schema import PrecisionConfig, Recipe
from student.recipe.validate import validate
from student.training.optimizer import build_optimizer
from student.training.precision import PrecisionChoice, apply, choose
from student.training.setup import TrainConfig, build_run
from student.training.step import Update

if TYPE_CHECKING:
    from pipeline.bench.world import World
    from precompute.teachers.teacher import Teacher
    from storage.progress import Progress
    from storage.store.store import Store
    from student.data.batch import Batch

# method -> (teacher, its losses)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "AAL": ("mobilenetv2_100", {"aal": {}}),
    "class rows": ("vit_tiny_patch16_224", {"advit": {"layers": "uniform", "grid": "bicubic"}}),
}
PLAIN = "labels alone"
PIECE = 16  # images that a live teacher sees at a time on a CPU, where whole batches are slower
LIVE_TURNS = 2
_SMALL = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4}
# case -> student, batch size, side of the view images, grid of its patches, samples in each of two shards
CASES: dict[str, tuple[dict[str, Any], int, int, int, int]] = {
    "6 layers of 128, 32x32": (_SMALL, 128, 32, 8, 640),
    "DeiT-Tiny, 224x224": ({"model": "deit_tiny_patch16_224"}, 32, 224, 14, 128),
}


class _Epochs:
    """A recipe's training, an epoch a turn: reading comes in bursts, so that single steps would leave it out.

    With a live teacher nothing is read but images: what it says of them takes the place of stored targets.
    """

    def __init__(self, world: World, store: Store, shards: list[str], recipe: Recipe, teacher: Teacher | None) -> None:
        out = world.folder / "unused"
        config = TrainConfig(recipe=recipe, shards=shards, val=shards, out=out, store=store, device=world.device)
        run = build_run(config, world.quiet, None)
        self.distiller, self.stream = run.distiller.train(), run.stream
        optimizer, _ = build_optimizer(recipe, self.distiller, self.stream.order.steps)
        self.device = torch.device(world.device)
        self.update = Update(recipe, self.distiller, optimizer, average=None, device=self.device, scaled=False)
        self.numbers = itertools.count()
        self.live = {}
        if teacher is not None:
            source, size, blocks = self.stream.source, recipe.stream.batch_size, recipe.stream.shuffle_blocks
            taps = {target: Tap.of(store.target(target).identity) for target in source.targets}
            taps = {
                target: dataclasses.replace(tap, native=False) for target, tap in taps.items()
            }  # as students take it
            self.live = {target: world.live(teacher, [tap], source.policy.size) for target, tap in taps.items()}
            self.stream = Stream(shards, batch_size=size, store=store, bank=source.bank, shuffle_blocks=blocks)

    def __call__(self) -> float:
        """Seconds of a step, the mean over an epoch, loader included."""
        began = time.perf_counter()
        for step, batch in enumerate(self.stream.epoch(next(self.numbers))):
            on_device = batch.to(self.device)
            self.update(self._taught(on_device) if self.live else on_device, 0, step)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return (time.perf_counter() - began) / self.stream.order.steps

    def _taught(self, batch: Batch) -> Batch:
        """The batch with what the live teachers say of it, in the student's precision."""
        precision = self.distiller.precision
        pieces = torch.split(batch.images, PIECE if self.device.type == "cpu" else len(batch.images))
        with torch.no_grad(), torch.autocast(self.device.type, precision, enabled=precision is not None):
            now = {t: torch.cat([teacher(piece)[0].float() for piece in pieces]) for t, teacher in self.live.items()}
        exact = {target: Codec("f32", tuple(values.shape[1:]), 1) for target, values in now.items()}
        return dataclasses.replace(batch, targets={t: {"data": values} for t, values in now.items()}, codecs=exact)


def steps(world: World, turns: int, live: bool, progress: Progress) -> list[Measure]:
    """(3) A step from the store ÷ one with labels alone; (4) with `live`, one with the live teacher ÷ from the store.

    Each in f32, and as `precision.amp_dtype: auto` computes here where that is something else.
    """
    rows = []
    for case, (student, size, side, grid, samples) in itertools.islice(CASES.items(), 1 if world.quick else None):
        shards, store = world.small(samples, side), world.store(f"steps-{side}")
        teachers = {method: world.teacher(model) for method, (model, _) in METHODS.items()}
        for method, teacher in teachers.items():
            target = f"activations,grid={grid},codec=u8" if method == "AAL" else "class_row,codec=f16"
            world.recorded(store, shards, teacher, [target], side)
        common = {"student": student, "model_ema_decay": None, "stream": {"batch_size": size, "shuffle_blocks": 1}}
        recipes = {
            method: validate({**common, "losses": {"crossentropy": {}, **losses}}, "bench")
            for method, (_, losses) in {PLAIN: ("", {}), **METHODS}.items()
        }
        trainings = {method: _Epochs(world, store, shards, recipe, None) for method, recipe in recipes.items()}
        if live:
            for method, teacher in teachers.items():
                trainings[f"{method}, live"] = _Epochs(world, store, shards, recipes[method], teacher)
        for choice in _choices(torch.device(world.device)):
            how = f"{choice.amp_dtype.replace('none', 'float32')}, {choice.kernel}"
            progress.say(f"training, {case}, {how}")
            where = f"{case}; {how}"
            for training in trainings.values():
                apply(training.distiller, choice)
            times = interleaved({method: trainings[method] for method in recipes}, turns)
            words = "a step from the store ÷ with labels alone"
            pairs = {method: (method, PLAIN) for method in METHODS}
            rows += _measures(where, times, pairs, number=3, words=words, bar=1.10, most=True)
            if live:
                times = interleaved({name: one for name, one in trainings.items() if name != PLAIN}, LIVE_TURNS)
                words = "a step with the live teacher ÷ from the store"
                pairs = {method: (f"{method}, live", method) for method in METHODS}
                rows += _measures(where, times, pairs, number=4, words=words)
    return rows


def _measures(where: str, times: Turns, pairs: dict[str, tuple[str, str]], **what: Any) -> list[Measure]:
    """A measure for each method, of a pair of contenders whose seconds are divided."""
    rows, milliseconds = [], {name: round(1000 * Spread.of(values).median, 1) for name, values in times.items()}
    for method, (above, below) in pairs.items():
        case, ratio, turns = f"{method}; {where}", ratios(times[above], times[below]), len(times[below])
        rows.append(Measure(case=case, ratio=ratio, turns=turns, about={"ms a step": milliseconds}, **what))
    return rows


def _choices(device: torch.device) -> list[PrecisionChoice]:
    """f32, and what `precision.amp_dtype: auto` is on this device if that is another precision."""
    f32, auto = choose(PrecisionConfig(), device), choose(PrecisionConfig(amp_dtype="auto"), device)
    return [f32] if auto.amp_dtype == "none" else [f32, auto]
