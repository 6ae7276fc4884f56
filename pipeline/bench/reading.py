"""Bench of reading: the stream with targets ÷ without, stored pixels ÷ decoding, a target ÷ the same bytes mapped."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.bench.timing import Measure, Spread, interleaved, ratios, seconds
from storage.store.markers import Task
from student.data.block_reader import BlockReader
from student.data.shuffle import Segment
from student.data.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline.bench.world import World
    from storage.progress import Progress
    from storage.store.store import Store

# case -> side of the images and views, grid of the maps, samples in each of two shards, batch size
CASES = {"32x32": (32, 8, 640, 128), "224x224": (224, 14, 128, 32)}


def streams(world: World, turns: int, progress: Progress) -> list[Measure]:
    """(5) Images a second of the joined stream ÷ without targets; of stored view images ÷ of decoded ones. And (6)."""
    rows = []
    for case, (side, grid, samples, size) in itertools.islice(CASES.items(), 1 if world.quick else None):
        shards = world.small(samples, side)
        store, with_images = world.store(f"stream-{side}"), world.store(f"pixels-{side}")
        model = "resnet10t" if world.quick else "mobilenetv2_100"
        wanted = [f"activations,grid={grid},codec={codec}" for codec in ("u8", "u4")]
        target, small_target = world.recorded(store, shards, world.teacher(model), wanted, side)
        small = world.teacher("resnet10t", 64)
        world.recorded(with_images, shards, small, ["embedding,codec=f16"], side, store_views=True)
        progress.say(f"stream, {case}")
        joined = _stream(shards, size, store, [target])
        plain, stored = _stream(shards, size, store, []), _stream(shards, size, with_images, [])
        contenders = {"joined": joined, "without targets": plain, "stored pixels": stored}
        times = interleaved({name: _epochs(stream) for name, stream in contenders.items()}, turns)
        about = _rates("images_per_second", joined.order.steps * size, times)
        maps, without = f"{case}, activations of {model}", times["without targets"]
        price, decoded = ratios(without, times["joined"]), ratios(without, times["stored pixels"])
        measure = partial(Measure, number=5, turns=turns, about=about)
        rows += [
            measure(case=maps, words="the joined stream ÷ without targets", ratio=price, bar=0.9),
            measure(case=case, words="stored pixels ÷ decoding and rendering", ratio=decoded),
            _target(joined, target, turns, f"{maps}, u8"),
            _target(_stream(shards, size, store, [small_target]), small_target, turns, f"{maps}, u4"),
        ]
    return rows


def _stream(shards: list[str], size: int, store: Store, targets: list[str]) -> Stream:
    bank = next(iter(store.banks()))
    return Stream(shards, batch_size=size, store=store, targets=targets, bank=bank, shuffle_blocks=1)


def _epochs(stream: Stream) -> Callable[[], float]:
    """What takes the seconds of epoch after epoch of a stream, all batches taken."""
    numbers = itertools.count()
    return lambda: seconds(lambda: [batch.labels.sum() for batch in stream.epoch(next(numbers))])


def _rates(unit: str, amount: float, times: dict[str, list[float]]) -> dict[str, object]:
    """How much of an amount each contender does in a second."""
    return {unit: {name: round(amount / Spread.of(values).median, 1) for name, values in times.items()}}


def _target(stream: Stream, target: str, turns: int, case: str) -> Measure:
    """(6) Reading a target, checksums compared, ÷ copying the same bytes out of memory-mapped files."""
    source, store = stream.source, stream.source.store
    assert store is not None
    reader = BlockReader(source)
    markers = [store.marker(Task("target", target, shard.id, 0)) for shard in source.shards]
    segments = [Segment(shard=n, block=0, samples=np.arange(marker.samples)) for n, marker in enumerate(markers)]
    files = [Path(store.url) / key for marker in markers for array in marker.arrays.values() for key in array.keys]
    size = sum(path.stat().st_size for path in files)
    contenders = {
        "read": lambda: seconds(lambda: [reader.targets(segment, 0) for segment in segments]),
        "mapped": lambda: seconds(lambda: [np.array(np.memmap(path, np.uint8, "r")) for path in files]),
    }
    times = interleaved(contenders, turns)
    about, ratio = _rates("mb_per_second", size / 1e6, times), ratios(times["mapped"], times["read"])
    about["bytes a view image"] = source.targets[target].sample_bytes
    words = "reading a target ÷ the same bytes memory-mapped"
    return Measure(number=6, case=case, words=words, ratio=ratio, turns=turns, about=about)
