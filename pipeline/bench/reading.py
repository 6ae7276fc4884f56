"""Bench of reading: the stream with targets ÷ without, stored pixels ÷ decoding, a target ÷ the same bytes mapped."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.bench.timing import Measure, Spread, interleaved, ratios, seconds
from storage.store.markers import Task
from student.data.block_reader import BlockReader
from student.data.shuffle import Segment
from student.data.stream import Stream

if TYPE_CHECKING:
    from pipeline.bench.world import World
    from storage.progress import Progress

# case -> side of the images and views, grid of the maps, samples in each of two shards, batch size
CASES = {"32x32": (32, 8, 640, 128), "224x224": (224, 14, 128, 32)}


def streams(world: World, cases: list[str], turns: int, progress: Progress) -> list[Measure]:
    """(5) Images a second of the joined stream ÷ without targets; of stored view images ÷ of decoded ones. And (6)."""
    rows = []
    for case in cases:
        side, grid, samples, size = CASES[case]
        shards = world.small(samples, side)
        store, kept = world.store(f"stream-{side}"), world.store(f"pixels-{side}")
        model = "resnet10t" if world.quick else "mobilenetv2_100"
        teacher = world.teacher(model)
        (target,) = world.recorded(store, shards, teacher, [f"activations,grid={grid},codec=u8"], side)
        world.recorded(kept, shards, world.teacher("resnet10t", 64), ["embedding,codec=f16"], side, store_views=True)
        progress.say(f"stream, {case}")

        def stream(place: Any, targets: list[str], size: int = size, shards: list[str] = shards) -> Stream:
            bank = next(iter(place.banks()))
            return Stream(shards, batch_size=size, store=place, targets=targets, bank=bank, shuffle_blocks=1)

        joined = stream(store, [target])
        several = {"joined": joined, "without targets": stream(store, []), "stored pixels": stream(kept, [])}
        found = interleaved({name: _Epochs(one) for name, one in several.items()}, turns)
        count = joined.order.steps * size
        about: dict[str, object] = {
            "images_per_second": {name: round(count / Spread.of(v).median, 1) for name, v in found.items()}
        }
        plain, maps = found["without targets"], f"{case}, activations of {model}"
        price, decoded = ratios(plain, found["joined"]), ratios(plain, found["stored pixels"])
        measure = partial(Measure, number=5, turns=turns, about=about)
        rows += [
            measure(case=maps, words="the joined stream ÷ without targets", ratio=price, bar=0.9),
            measure(case=case, words="stored pixels ÷ decoding and rendering", ratio=decoded),
            _target(joined, target, turns, maps),
        ]
    return rows


class _Epochs:
    """Seconds of epoch after epoch of a stream, all batches taken."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.epoch = stream, -1

    def __call__(self) -> float:
        self.epoch += 1
        return seconds(lambda: [batch.labels.sum() for batch in self.stream.epoch(self.epoch)])


def _target(stream: Stream, target: str, turns: int, case: str) -> Measure:
    """(6) Reading a target, checksums compared, ÷ copying the same bytes out of memory-mapped files."""
    source = stream.source
    reader = BlockReader(source)
    files: list[Path] = []
    segments: list[Segment] = []
    store = source.store
    assert store is not None
    for number, shard in enumerate(source.shards):
        marker = store.marker(Task("target", target, shard.id, 0))
        (samples, *_), *_ = (array.shape for array in marker.arrays.values())
        segments.append(Segment(shard=number, block=0, samples=np.arange(samples)))
        files += [Path(store.url) / key for array in marker.arrays.values() for key in array.keys]
    size = sum(path.stat().st_size for path in files)
    found = interleaved(
        {
            "read": lambda: seconds(lambda: [reader.targets(segment, 0) for segment in segments]),
            "mapped": lambda: seconds(lambda: [np.array(np.memmap(path, np.uint8, "r")) for path in files]),
        },
        turns,
    )
    rates: dict[str, object] = {
        "mb_per_second": {name: round(size / 1e6 / Spread.of(values).median, 1) for name, values in found.items()}
    }
    words = "reading a target ÷ the same bytes memory-mapped"
    ratio = ratios(found["mapped"], found["read"])
    return Measure(number=6, case=case, words=words, ratio=ratio, turns=turns, about=rates)
