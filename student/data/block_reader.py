"""Reading: blocks of a shard with their stored views and targets, each compared with what the store says of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

from storage.errors import IdentityError, UserError
from storage.rng import generator
from storage.shards.index import ShardIndex, cached_index, read_samples
from storage.store.banks import BankView, read_views
from storage.store.codecs import Codec
from storage.store.markers import Marker, Task
from storage.views.draw import draw_view
from storage.views.mixing import mix_images
from storage.views.render import BadImage, decode, render
from storage.views.view import Mix
from student.data.shuffle import Segment
from student.data.source import Source

Arrays = dict[str, np.ndarray]

_Look = Callable[[int], tuple[Mix | None, np.ndarray]]  # a sample's index -> its mixing, its pixels before that

BlockPart = tuple[Arrays, dict[str, Arrays]]  # images, labels and ids of some samples; target id -> its arrays


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
        source = self.source
        assert source.store is not None
        marker = source.store.marker(task)
        codec = Codec("raw", (source.policy.size, source.policy.size, 3), 2) if task.id == source.pixels else None
        marker.require(len(self.index(source.shards.index(task.shard))), source.targets.get(task.id, codec))
        if task.kind == "target":
            bank = self.marker(Task("bank", str(source.bank), task.shard, task.view))
            digest, recorded = bank.bank.views_digest, marker.target.bank_views
            if recorded != digest:
                hint = "These targets were made from other views than the bank has now."
                raise IdentityError(marker.name, "bank_views", digest, recorded, hint)
        return marker

    def read(self, segment: Segment, view: int) -> BlockPart:
        """The samples of a segment in one view: images, labels and ids, and the arrays of each target.

        `others` and `shares` are labels of mixing partners and their share of the image, 0 where nothing is mixed.

        Raises:
            IdentityError: an image, key, label or pixel is not what it was.
            DamageError: an object of the store is missing or damaged.
        """
        index = self.index(segment.shard)
        chosen = segment.samples
        images, mixes = self._images(segment, index, view)
        labels = [index.labels[i] for i in chosen]
        others = [index.labels[mix.partner] if mix else own for mix, own in zip(mixes, labels, strict=True)]
        return {
            "images": images,
            "labels": np.array([-1 if label is None else label for label in labels], np.int64),
            "others": np.array([-1 if label is None else label for label in others], np.int64),
            "shares": np.array([mix.amount / 256 if mix else 0 for mix in mixes], np.float32),
            "ids": np.stack(
                [np.full(len(chosen), segment.shard), chosen, np.full(len(chosen), view)], 1, dtype=np.int64
            ),
        }, self.targets(segment, view)

    def targets(self, segment: Segment, view: int) -> dict[str, Arrays]:
        """Target id -> its arrays for the samples of a segment in one view. Raises DamageError."""
        source, shard = self.source, self.source.shards[segment.shard]
        chosen = segment.samples
        if source.permute is not None:
            chosen = _others(source.permute, shard, segment)
        first, stop = int(chosen.min()), int(chosen.max()) + 1
        found: dict[str, Arrays] = {}
        for target in source.targets:
            arrays = self.marker(Task("target", target, shard, view)).arrays
            found[target] = {name: array.read(first, stop)[chosen - first] for name, array in arrays.items()}
        return found

    def _images(self, segment: Segment, index: ShardIndex, view: int) -> tuple[np.ndarray, list[Mix | None]]:
        """The view images of a segment, uint8 `[n, S, S, 3]`, and how each was mixed with its partner."""
        source = self.source
        shard, block = source.shards[segment.shard], index.block(segment.block)
        if source.bank is None:
            look = self._fresh(segment, index, view)
        else:
            stored = read_views(self.marker(Task("bank", source.bank, shard, view)), block.start, block.stop)
            if source.pixels is not None:
                first, stop = int(segment.samples[0]), int(segment.samples[-1]) + 1
                pixels = self.marker(Task("target", source.pixels, shard, view)).arrays["data"].read(first, stop)
                mixes = [stored.view(int(i)).mix for i in segment.samples]
                return pixels[segment.samples - first], mixes
            look = self._replayed(segment, index, view, stored)
        images, mixes = [], []
        for i in segment.samples:
            mix, own = look(int(i))
            images.append(mix_images(own, look(mix.partner)[1], mix) if mix else own)
            mixes.append(mix)
        return np.stack(images), mixes

    def _replayed(self, segment: Segment, index: ShardIndex, view: int, stored: BankView) -> _Look:
        """A sample's mixing and its own pixels, rendered again from the stored view; each sample once."""
        source, url = self.source, self.source.urls[segment.shard]
        mixes = {int(i): stored.view(int(i)).mix for i in segment.samples}
        needed = {*mixes, *(mix.partner for mix in mixes.values() if mix)}
        span = range(min(needed), max(needed) + 1)
        samples = read_samples(url, index, span)
        where = f"{url}, bank {source.bank}, view {view}"

        @functools.cache
        def look(i: int) -> tuple[Mix | None, np.ndarray]:
            sample = samples[i - span.start]
            pixels = stored.replay(i, sample, sample.image, source.policy.size, where)
            return mixes.get(i), pixels

        return look

    def _fresh(self, segment: Segment, index: ShardIndex, view: int) -> _Look:
        """The same of views that are drawn now."""
        source, block = self.source, index.block(segment.block)
        url = source.urls[segment.shard]
        span = block if source.policy.mixes else range(int(segment.samples[0]), int(segment.samples[-1]) + 1)
        samples = read_samples(url, index, span)

        @functools.cache
        def look(i: int) -> tuple[Mix | None, np.ndarray]:
            sample = samples[i - span.start]
            try:
                image = decode(sample.image)
            except BadImage as error:
                raise UserError(
                    f"{url}: key {sample.key!r}: {error}\n  Mend or remove the image and pack again"
                ) from None
            drawn = draw_view(source.policy, sample.key, view, image.size, i, block)
            return drawn.mix, render(image, drawn, source.policy.size)

        return look


def _others(seed: int, shard: str, segment: Segment) -> np.ndarray:
    """For each sample of a segment another valid one of its block, by a fixed derangement; its own if it is alone."""
    whole = segment.samples if segment.whole is None else segment.whole
    others, chance = whole.copy(), generator("permuted targets", seed, shard, segment.block)
    for i in range(len(others) - 1, 0, -1):  # Sattolo's algorithm: one cycle through all, so nobody stays
        j = int(chance.integers(i))
        others[i], others[j] = others[j], others[i]
    return others[np.searchsorted(whole, segment.samples)]


def join(parts: Sequence[BlockPart]) -> BlockPart:
    """Samples of several parts after another."""
    first, targets = parts[0]
    arrays = {name: np.concatenate([part[0][name] for part in parts]) for name in first}
    joined = {
        t: {name: np.concatenate([part[1][t][name] for part in parts]) for name in names}
        for t, names in targets.items()
    }
    return arrays, joined
