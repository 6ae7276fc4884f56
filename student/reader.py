"""Reading: blocks of a shard with their stored views and targets, each compared with what the store says of it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from storage.banks import read_views
from storage.errors import IdentityError, UserError
from storage.policies import Policy
from storage.shards import ShardIndex, cached_index, read_samples
from storage.store import Marker, Store, Task
from storage.views import BadImage, decode, draw, render
from student.order import Segment

Arrays = dict[str, np.ndarray]
Part = tuple[Arrays, dict[str, Arrays]]  # images, labels and ids of some samples; target id -> its arrays


@dataclass(frozen=True)
class Source:
    """Where a stream's samples come from; plain data that loader workers receive.

    Attributes:
        urls: the shards.
        shards: their ids.
        policy: of the views.
        store: with the bank and the targets; None for fresh views.
        bank: id of the bank; None for fresh views, whose number is the epoch.
        targets: target id -> codec.
        stored: whether the store's index fits each file; a tar with other headers is read by its own.
    """

    urls: tuple[str, ...]
    shards: tuple[str, ...]
    policy: Policy
    store: Store | None = None
    bank: str | None = None
    targets: Mapping[str, str] = field(default_factory=dict, hash=False)
    stored: tuple[bool, ...] = ()


class BlockReader:
    """Reads segments of blocks: images rendered, signatures compared, targets beside them."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.index = functools.lru_cache(maxsize=256)(self._index)
        self.marker = functools.lru_cache(maxsize=4096)(self._marker)

    def _index(self, shard: int) -> ShardIndex:
        """The index; the file was compared with it when the stream was made, and each sample is when it is read."""
        url, expected = self.source.urls[shard], self.source.shards[shard]
        if self.source.store is not None and self.source.stored[shard]:
            return self.source.store.index(expected)
        index = cached_index(url, trust=True)
        if index.id != expected:
            raise IdentityError(url, "shard", expected, index.id, "The file changed while it was in use.")
        return index

    def _marker(self, task: Task) -> Marker:
        assert self.source.store is not None
        marker = self.source.store.marker(task)
        if task.kind == "target":
            bank = self.marker(Task("bank", str(self.source.bank), task.shard, task.view))
            if marker.content["bank_views"] != bank.views_digest:
                name = f"{self.source.store.url}/done/{task.name}"
                raise IdentityError(
                    name, "bank_views", bank.views_digest, marker.content["bank_views"],
                    "These targets were made from other views than the bank has now.",
                )  # fmt: skip
        return marker

    def read(self, segment: Segment, view: int) -> Part:
        """The samples of a segment in one view: images, labels and ids, and the arrays of each target.

        Raises:
            IdentityError: an image, key, label or pixel is not what it was.
            DamageError: an object of the store is missing or damaged.
        """
        source = self.source
        url, shard = source.urls[segment.shard], source.shards[segment.shard]
        index = self.index(segment.shard)
        span = range(int(segment.samples[0]), int(segment.samples[-1]) + 1)
        samples = read_samples(url, index, span)
        chosen = segment.samples - span.start
        side = source.policy.size
        images = np.empty((len(chosen), side, side, 3), np.uint8)
        targets: dict[str, Arrays] = {}
        if source.bank is not None:
            bank = self.marker(Task("bank", source.bank, shard, view))
            there = read_views(bank, span.start, span.stop)
            where = f"{url}, bank {source.bank}, view {view}"
            for row, i in enumerate(chosen):
                images[row] = there.replay(int(i), samples[i], samples[i].image, side, where)
            for target in source.targets:
                marker = self.marker(Task("target", target, shard, view))
                targets[target] = {
                    name: array.read(span.start, span.stop)[chosen] for name, array in marker.arrays.items()
                }
        else:
            for row, i in enumerate(chosen):
                try:
                    image = decode(samples[i].image)
                except BadImage as error:
                    raise UserError(f"{url}: key {samples[i].key!r}: {error}") from None
                drawn = draw(source.policy, samples[i].key, view, image.size)
                images[row] = render(image, drawn, side)
        labels = np.array([-1 if samples[i].label is None else samples[i].label for i in chosen], np.int64)
        ids = np.stack([np.full(len(chosen), segment.shard), segment.samples, np.full(len(chosen), view)], 1)
        return {"images": images, "labels": labels, "ids": ids.astype(np.int64)}, targets


def join(parts: Sequence[Part]) -> Part:
    """Samples of several parts after another."""
    first, targets = parts[0]
    arrays = {name: np.concatenate([part[0][name] for part in parts]) for name in first}
    joined = {
        t: {name: np.concatenate([part[1][t][name] for part in parts]) for name in names}
        for t, names in targets.items()
    }
    return arrays, joined
