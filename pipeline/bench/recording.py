"""Bench of precompute: its speed ÷ what the cores allow, and ÷ the same engine with PyTorch in ONNX Runtime's place."""

from __future__ import annotations

import functools
import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from dask.system import CPU_COUNT

from pipeline.bench.timing import Measure, Spread, cpu_seconds, interleaved, ratios, seconds
from precompute.engine.session import Session, open_session
from precompute.engine.shard import run_task
from precompute.run import PrecomputePlan, plan_precompute
from precompute.taps import Tap
from precompute.throughput import part_of
from storage.constants import BLOCK
from storage.errors import UserError, first_line
from storage.store.attempts import Attempt
from storage.store.markers import Task
from storage.views.draw import draw_view, settle
from storage.views.mixing import mix_images
from storage.views.render import decode, render, signature

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pipeline.bench.world import World
    from precompute.engine.tasks import Outcome, ShardTask
    from storage.progress import Progress
    from storage.views.view import View

BATCHES = (4, 8, 16, 32, 64)  # of PyTorch; the best one is taken


class _Torch:
    """A session's stand-in: the PyTorch teacher with the same taps, uint8 images in, f32 arrays out."""

    def __init__(self, run: Callable[[torch.Tensor], Sequence[torch.Tensor]], batch: int, device: str) -> None:
        self._run, self.batch, self.device = run, batch, device
        self.settings: dict[str, Any] = {}

    def run(self, images: np.ndarray) -> list[np.ndarray]:
        """As `Session.run`."""
        parts = []
        with torch.inference_mode():
            for start in range(0, len(images), self.batch):
                there = torch.from_numpy(images[start : start + self.batch]).to(self.device)
                parts.append([output.float().cpu().numpy() for output in self._run(there)])
        return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]


class _Case:
    """A teacher over one shard: the engine on it as often as wanted, each time into targets of its own."""

    def __init__(self, world: World, name: str) -> None:
        self.name, self.world = name, world
        self.wanted = world.wanted(name)
        self.store = world.store(f"bench-{name}")
        self.job: PrecomputePlan = plan_precompute(self.store, self.wanted, world.quiet)
        (self.graph,) = self.job.by_graph
        self.outputs = self.job.by_graph[self.graph]
        self.shard = world.photos()
        self.samples = self.shard.samples
        self.numbers = itertools.count()
        self.session = open_session(self.store.graph(self.wanted.teacher.name, self.graph), world.provider, CPU_COUNT)

    def task(self) -> ShardTask:
        """Everything of the shard, under a name that the store does not know yet."""
        return part_of(self.job, self.graph, self.shard, self.samples, f"turn{next(self.numbers)}")

    def engine(self, session: Any) -> float:
        """Seconds that the engine takes with a session; what it wrote is removed again."""
        task = self.task()
        outcome: list[Outcome] = []
        taken = seconds(lambda: outcome.append(run_task(task, lambda: session, CPU_COUNT)))
        for id in (task.policy.bank, *(output.target for output in self.outputs)):
            kind = "banks" if id == task.policy.bank else "targets"
            self.store.objects.remove(f"{kind}/{id}/{outcome[0].shard.id}")
        return taken

    # ------------------------------------------------------------------------------------------ each part alone

    def parts(self) -> dict[str, Callable[[], float]]:
        """Part -> what measures its CPU seconds a sample, on the first block."""
        assert self.shard.opened is not None
        shard, policy = self.shard.opened, self.job.policy
        block = shard.index.block(0)
        samples = shard.read(block)
        images = [decode(sample.image) for sample in samples]
        pairs = list(enumerate(zip(samples, images, strict=True)))

        def draw(view: int) -> list[View]:
            drawn = [draw_view(policy, s.key, view, image.size, i=i, block=block) for i, (s, image) in pairs]
            return settle(drawn, block)

        drawn = [draw(view) for view in range(self.job.views)]
        pixels = [self._rendered(images, views) for views in drawn]
        values = [self.session.run(one) for one in pixels]
        arrays = [self._encoded(one) for one in values]
        threads = ThreadPoolExecutor(CPU_COUNT)

        def all_decoded() -> None:
            again = shard.read(block)
            list(threads.map(lambda sample: decode(sample.image), again))

        def all_rendered() -> None:
            list(threads.map(lambda views: self._rendered(images, views), drawn))

        parts: dict[str, Callable[[], object]] = {
            "session": lambda: [self.session.run(one) for one in pixels],
            "decoding": all_decoded,
            "rendering": all_rendered,
            "encoding": lambda: [self._encoded(one) for one in values],
            "writing": lambda: list(map(self._write, arrays)),
        }
        return {name: functools.partial(self._each, part, len(samples)) for name, part in parts.items()}

    @staticmethod
    def _each(part: Callable[[], object], samples: int) -> float:
        return cpu_seconds(part) / samples

    def _rendered(self, images: Sequence[Any], views: Sequence[View]) -> np.ndarray:
        own = [render(image, view, self.job.policy.size) for image, view in zip(images, views, strict=True)]
        for image in own:
            signature(image)
        mixes = [view.mix for view in views]
        return np.stack([mix_images(o, own[m.partner], m) if m else o for o, m in zip(own, mixes, strict=True)])

    def _encoded(self, values: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
        found = []
        for output in self.outputs:
            assert output.position is not None
            of_view = values[output.position]
            assert np.isfinite(of_view).all()
            found.append(output.codec.encode(of_view))
        return found

    def _write(self, arrays: Sequence[dict[str, np.ndarray]]) -> None:
        shard = f"alone{next(self.numbers)}"
        for output, several in zip(self.outputs, arrays, strict=True):
            attempt = Attempt(self.store, Task("target", output.target, shard, 0), len(next(iter(several.values()))))
            for name, part in output.codec.layout().items():
                attempt.array(name, part.shape, part.dtype, part.axes).append(several[name])
            for writer in attempt.arrays.values():
                writer.finish()
            attempt.abandon()


def limits(world: World, names: Sequence[str], turns: int, progress: Progress) -> list[Measure]:
    """(1) Samples a second of precompute ÷ what the cores allow; on a GPU ÷ the bare session.

    The limit is cores ÷ the sum of CPU seconds a sample that each part takes alone: read and decode, render with
    mixing and signatures, the session, encode, write. It cannot be beaten; it is reached where no core ever waits.
    """
    rows = []
    for name in names:
        case = _Case(world, name)
        progress.say(f"precompute, {case.name}: {case.samples} samples, {case.job.views} views")
        parts = case.parts()
        on_gpu = case.session.settings["provider"] == "cuda"
        alone = functools.partial(_session_seconds, case) if on_gpu else None
        contenders: dict[str, Callable[[], float]] = {"engine": functools.partial(_engine_seconds, case), **parts}
        if alone:
            contenders["bare session"] = alone
        found = interleaved(contenders, turns)
        cpu = {part: Spread.of(found[part]).median for part in parts}
        least = [sum(found[part][turn] for part in parts) / CPU_COUNT for turn in range(turns)]
        below = found["bare session"] if alone else least
        rate = 1 / Spread.of(found["engine"]).median
        about: dict[str, object] = {
            "samples_per_second": round(rate, 2),
            "limit": round(1 / Spread.of(below).median, 2),
            "cores": CPU_COUNT,
            "cpu_ms_per_sample": {part: round(1000 * value, 2) for part, value in cpu.items()},
        }
        words = f"precompute ÷ {'the bare session' if alone else 'what the cores allow'}"
        ratio, bar = ratios(below, found["engine"]), None if alone else 0.9
        rows.append(Measure(number=1, case=case.name, words=words, ratio=ratio, turns=turns, about=about, bar=bar))
    return rows


def _engine_seconds(case: _Case) -> float:
    """Seconds of the engine for one sample."""
    return case.engine(case.session) / case.samples


def _session_seconds(case: _Case) -> float:
    """Seconds of the bare session over as many images as a sample has views."""
    side = case.job.policy.size
    images = np.random.default_rng(0).integers(0, 256, (BLOCK, side, side, 3), np.uint8)
    return seconds(lambda: case.session.run(images)) / BLOCK * case.job.views


def against_torch(world: World, names: Sequence[str], turns: int, progress: Progress) -> list[Measure]:
    """(2) The same ÷ the engine with eager PyTorch (channels last, its best batch size), and with `torch.compile`."""
    rows = []
    for name in names:
        case = _Case(world, name)
        progress.say(f"precompute against PyTorch, {case.name}")
        taps = [Tap.of(case.store.target(output.target).identity) for output in case.outputs]
        module = world.live(case.wanted.teacher, taps, case.job.policy.size)
        batch = _best(module, case.job.policy.size, world.device)
        rivals: dict[str, _Torch] = {"eager PyTorch": _Torch(module, batch, world.device)}
        compiled = _Torch(torch.compile(module, dynamic=False), batch, world.device)
        try:
            compiled.run(np.zeros((BLOCK, case.job.policy.size, case.job.policy.size, 3), np.uint8))
            rivals["torch.compile"] = compiled
        except Exception as error:  # no compiler, or one that cannot
            progress.say(f"  torch.compile does not work here: {first_line(error)[:100]}")
        sessions: dict[str, Session | _Torch] = {"engine": case.session, **rivals}
        found = interleaved({n: functools.partial(case.engine, s) for n, s in sessions.items()}, turns)
        speeds = {n: round(case.samples / Spread.of(found[n]).median, 2) for n in sessions}
        measure = functools.partial(
            Measure, number=2, case=case.name, turns=turns, about={"samples_per_second": speeds, "batch": batch}
        )
        rows += [
            measure(words=f"precompute ÷ with {rival}", ratio=ratios(found[rival], found["engine"])) for rival in rivals
        ]
    return rows


def _best(module: torch.nn.Module, side: int, device: str) -> int:
    """The batch size at which eager PyTorch is fastest."""
    images = np.random.default_rng(0).integers(0, 256, (max(BATCHES), side, side, 3), np.uint8)
    runs = {str(batch): _Torch(module, batch, device) for batch in BATCHES}
    try:
        turns = {n: functools.partial(seconds, functools.partial(r.run, images)) for n, r in runs.items()}
        found = interleaved(turns, 2)
    except RuntimeError as error:
        raise UserError(f"PyTorch cannot run the teacher here: {first_line(error)}") from None
    return int(min(found, key=lambda name: min(found[name])))
