"""How fast a run will be: the real engine on growing parts of shards, for at most a tenth of what the run will take."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from precompute.engine.dask_client import processes
from precompute.engine.dask_runner import retry_io
from precompute.engine.tasks import Failure, ShardTask
from precompute.results import Throughput
from storage.errors import UserError
from storage.progress import NoProgress, Progress
from storage.shards.index import ShardIndex, build_index
from storage.shards.shard import Shard
from storage.shards.tar import stem_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from precompute.run import PrecomputePlan


FIRST = 8  # samples of the first round, which also opens the sessions

SHARE = 0.1  # of what the run will take, at most

AGREE, WITHIN = 3, 0.05  # so many rounds on end whose rates differ by so little are enough


class Measured(NamedTuple):
    """Seconds spent, view images made in them, and the rate of the last round, the largest: view images a second."""

    seconds: float
    images: int
    rate: float


def growing(run: Callable[[int], tuple[float, int]], todo: int, seconds: float) -> Measured:
    """Measure in rounds, each twice as large as the one before.

    The first round counts alone where the whole run is hardly larger. No further round is begun that would take the
    time beyond `seconds`, or time or images beyond a tenth of what the whole run takes.

    Args:
        run: makes about so many samples on each process; gives seconds and view images.
        todo: view images of the whole run.
        seconds: to measure for at most.
    """
    spent, images = 0.0, 0
    rates: list[float] = []
    while True:
        taken, made = run(FIRST * 2 ** len(rates))
        spent, images = spent + taken, images + made
        rates.append(made / max(taken, 1e-9))
        last = rates[-AGREE:]
        agree = len(rates) > AGREE and max(last) - min(last) <= WITHIN * min(last)  # the first opens the sessions
        limit = min(seconds, SHARE * todo / rates[-1])
        if agree or spent + 2 * taken > limit or images + 2 * made > SHARE * todo:
            return Measured(seconds=spent, images=images, rate=rates[-1])


def measure(
    plan: PrecomputePlan, shards: Sequence[PlannedShard], *, todo: int, seconds: float, progress: Progress
) -> Throughput:
    """View images a second of the real engine, and seconds that the index of a shard takes for each image.

    Args:
        plan: over a scratch store, which all is written to.
        shards: of the run; those whose index is known are measured on.
        todo: view images that the run has to make.
        seconds: to measure for at most.
        progress: told what is measured.

    Raises:
        UserError: a measured shard fails.
    """
    opened = sorted((shard for shard in shards if shard.opened is not None), key=lambda shard: shard.samples)
    began = time.monotonic()
    build_index(opened[0].url)
    indexing = (time.monotonic() - began) / opened[0].samples
    count = max(1, processes(plan.client)) if plan.client else 1
    limits = f"for at most {seconds:.0f} s and a tenth of the run"
    progress.say(f"measuring on {count} process(es), beside the store, {limits}")

    def run(samples: int) -> tuple[float, int]:
        done, spent, number = 0, 0.0, count * max(1, samples // opened[-1].samples)
        for graph in plan.by_graph:
            shards_of = [opened[-1 - k % len(opened)] for k in range(number)]
            tasks = [part_of(plan, graph, shard, samples, f"{samples}x{k}") for k, shard in enumerate(shards_of)]
            start = time.monotonic()
            for _, outcome in plan.run(iter(tasks), number, NoProgress()):
                if isinstance(outcome, Failure):
                    raise UserError(outcome.error)
                done += outcome.rendered
            spent += time.monotonic() - start
        return spent, done // len(plan.by_graph)

    measured = growing(run, todo, seconds)
    return Throughput(
        seconds=round(measured.seconds, 2),
        view_images=measured.images,
        view_images_per_second=measured.rate,
        index_seconds_per_image=indexing,
        workers=count,
    )


def part_of(plan: PrecomputePlan, graph: str, shard: PlannedShard, samples: int, name: str) -> ShardTask:
    """A task over the first samples of a shard, under a name of its own in the scratch store."""
    assert shard.opened is not None
    index, stop = shard.opened.index, min(samples, shard.samples)
    keys, labels = index.keys[:stop], index.labels[:stop]
    id = f"{stem_of(shard.url)}-{name}"
    summary = index.summary.model_copy(update={"id": id, "samples": stop, "labelled": None not in labels})
    part = ShardIndex(summary, keys, index.digests[:stop], labels, index.starts[: stop + 1])
    retry_io(lambda: plan.store.add_index(part, shard.url))
    opened = Shard(shard.url, part, functools.partial(plan.store.index, part.id))
    return replace(plan.task(graph, shard.url), shard=opened)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedShard:
    """One shard as far as it is known.

    Attributes:
        url: of the shard.
        samples: how many it has, or an estimate.
        id: where the store knows it.
        estimated: whether nobody has read it yet.
        opened: the shard, of a few.
    """

    url: str
    samples: int
    id: str | None = None
    estimated: bool = False
    opened: Shard | None = None
