"""Bench of precompute: its speed ÷ what the cores allow, and ÷ the same engine with PyTorch in ONNX Runtime's place."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from dask.system import CPU_COUNT

from pipeline.bench.timing import Measure, Spread, cpu_seconds, interleaved, ratios, seconds
from pipeline.bench.world import TEACHERS
from precompute.engine.session import open_session
from precompute.engine.shard import run_task
from precompute.run import plan_precompute
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
    from precompute.engine.tasks import Outcome
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
                batch = torch.from_numpy(images[start : start + self.batch]).to(self.device)
                parts.append([output.float().cpu().numpy() for output in self._run(batch)])
        return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]


class _Case:
    """A teacher over one shard: the engine on it any number of times, each time into targets of its own."""

    def __init__(self, world: World, name: str) -> None:
        model, targets = TEACHERS[name]
        self.shard, self.teacher, self.store = world.photos(), world.teacher(model), world.store(f"bench-{name}")
        request = world.request([self.shard.url], self.teacher, targets, 224, num_views=4)
        self.plan = plan_precompute(self.store, request, world.quiet)
        ((self.graph, self.outputs),) = self.plan.by_graph.items()
        self.views, self.policy = self.plan.views, self.plan.policy
        self.numbers = itertools.count()
        self.session = open_session(self.store.graph(self.teacher.name, self.graph), world.device, CPU_COUNT)

    def engine(self, session: Any) -> float:
        """Seconds a sample that the engine takes with a session; what it wrote is removed again."""
        # Everything of the shard, under a name that the store does not know yet.
        task = part_of(self.plan, self.graph, self.shard, self.shard.samples, f"turn{next(self.numbers)}")
        outcomes: list[Outcome] = []
        taken = seconds(lambda: outcomes.append(run_task(task, lambda: session, CPU_COUNT)))
        for folder in (f"banks/{task.policy.bank}", *(f"targets/{output.target}" for output in self.outputs)):
            self.store.objects.remove(f"{folder}/{outcomes[0].shard.id}")
        return taken / self.shard.samples

    def bare_session(self) -> float:
        """Seconds of the bare session over as many images as a sample has views."""
        images = _noise(BLOCK, self.policy.size)
        return seconds(lambda: self.session.run(images)) / BLOCK * self.views

    # ------------------------------------------------------------------------------------------ each part alone

    def parts(self) -> dict[str, Callable[[], float]]:
        """Part -> what measures its CPU seconds a sample, on the first block."""
        assert self.shard.opened is not None
        shard, policy = self.shard.opened, self.policy
        block = shard.index.block(0)
        samples = shard.read(block)
        images = [decode(sample.image) for sample in samples]
        pairs = list(enumerate(zip(samples, images, strict=True)))

        def draw(view: int) -> list[View]:
            drawn = [draw_view(policy, s.key, view, image.size, i=i, block=block) for i, (s, image) in pairs]
            return settle(drawn, block)

        drawn = [draw(view) for view in range(self.views)]
        pixels = [self._rendered(images, views) for views in drawn]
        values = [self.session.run(view_images) for view_images in pixels]
        arrays = [self._encoded(outputs) for outputs in values]
        threads = ThreadPoolExecutor(CPU_COUNT)
        parts: dict[str, Callable[[], object]] = {
            "session": lambda: [self.session.run(view_images) for view_images in pixels],
            "decoding": lambda: list(threads.map(lambda sample: decode(sample.image), shard.read(block))),
            "rendering": lambda: list(threads.map(partial(self._rendered, images), drawn)),
            "encoding": lambda: [self._encoded(outputs) for outputs in values],
            "writing": lambda: list(map(self._write, arrays)),
        }
        return {name: partial(cpu_seconds, part, len(samples)) for name, part in parts.items()}

    def _rendered(self, images: Sequence[Any], views: Sequence[View]) -> np.ndarray:
        own = [render(image, view, self.policy.size) for image, view in zip(images, views, strict=True)]
        for image in own:
            signature(image)
        mixes = [view.mix for view in views]
        return np.stack([mix_images(o, own[m.partner], m) if m else o for o, m in zip(own, mixes, strict=True)])

    def _encoded(self, values: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
        encoded = []
        for output in self.outputs:
            assert output.position is not None
            of_view = values[output.position]
            assert np.isfinite(of_view).all()
            encoded.append(output.codec.encode(of_view))
        return encoded

    def _write(self, encoded: Sequence[dict[str, np.ndarray]]) -> None:
        shard = f"alone{next(self.numbers)}"
        for output, arrays in zip(self.outputs, encoded, strict=True):
            attempt = Attempt(self.store, Task("target", output.target, shard, 0), len(next(iter(arrays.values()))))
            for name, part in output.codec.layout().items():
                attempt.array(name, part.shape, part.dtype, part.axes).append(arrays[name])
            for writer in attempt.arrays.values():
                writer.finish()
            attempt.abandon()


def limits(world: World, turns: int, progress: Progress) -> list[Measure]:
    """(1) Samples a second of precompute ÷ what the cores allow; on a GPU ÷ the bare session.

    The limit is cores ÷ the sum of CPU seconds a sample that each part takes alone: read and decode, render with
    mixing and signatures, the session, encode, write. It cannot be beaten; it is reached where no core ever waits.
    """
    rows = []
    for name in TEACHERS:
        case = _Case(world, name)
        progress.say(f"precompute, {name}: {case.shard.samples} samples, {case.views} views")
        parts = case.parts()
        on_gpu = case.session.settings["provider"] == "cuda"
        contenders: dict[str, Callable[[], float]] = {"engine": partial(case.engine, case.session), **parts}
        if on_gpu:
            contenders["bare session"] = case.bare_session
        times = interleaved(contenders, turns)
        least = [sum(times[part][turn] for part in parts) / CPU_COUNT for turn in range(turns)]
        limit, bar = (times["bare session"], None) if on_gpu else (least, 0.9)
        words = f"precompute ÷ {'the bare session' if on_gpu else 'what the cores allow'}"
        about: dict[str, object] = {
            "samples_per_second": round(1 / Spread.of(times["engine"]).median, 2),
            "limit": round(1 / Spread.of(limit).median, 2),
            "cores": CPU_COUNT,
            "cpu_ms_per_sample": {part: round(1000 * Spread.of(times[part]).median, 2) for part in parts},
        }
        ratio = ratios(limit, times["engine"])
        rows.append(Measure(number=1, case=name, words=words, ratio=ratio, turns=turns, about=about, bar=bar))
    return rows


def against_torch(world: World, turns: int, progress: Progress) -> list[Measure]:
    """(2) The same ÷ the engine with eager PyTorch (channels last, its best batch size), and with `torch.compile`."""
    rows = []
    for name in TEACHERS:
        case = _Case(world, name)
        progress.say(f"precompute against PyTorch, {name}")
        taps = [Tap.of(case.store.target(output.target).identity) for output in case.outputs]
        size = case.policy.size
        module = world.live(case.teacher, taps, size)
        batch = _best(module, size, world.device)
        sessions = {"engine": case.session, "eager PyTorch": _Torch(module, batch, world.device)}
        compiled = _Torch(torch.compile(module, dynamic=False), batch, world.device)
        try:
            compiled.run(np.zeros((BLOCK, size, size, 3), np.uint8))
            sessions["torch.compile"] = compiled
        except Exception as error:  # no compiler, or one that cannot
            progress.say(f"  torch.compile does not work here: {first_line(error)[:100]}")
        times = interleaved({rival: partial(case.engine, session) for rival, session in sessions.items()}, turns)
        speeds = {rival: round(1 / Spread.of(values).median, 2) for rival, values in times.items()}
        about: dict[str, object] = {"samples_per_second": speeds, "batch": batch}
        engine = times.pop("engine")
        for rival, values in times.items():
            words, ratio = f"precompute ÷ with {rival}", ratios(values, engine)
            rows.append(Measure(number=2, case=name, words=words, ratio=ratio, turns=turns, about=about))
    return rows


def _noise(count: int, side: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)


def _best(module: torch.nn.Module, side: int, device: str) -> int:
    """The batch size at which eager PyTorch is fastest."""
    images = _noise(max(BATCHES), side)
    runs = {str(batch): partial(_Torch(module, batch, device).run, images) for batch in BATCHES}
    try:
        times = interleaved({batch: partial(seconds, run) for batch, run in runs.items()}, 2)
    except RuntimeError as error:
        raise UserError(f"PyTorch cannot run the teacher here: {first_line(error)}") from None
    return int(min(times, key=lambda batch: min(times[batch])))
