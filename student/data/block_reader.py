"""Reading: blocks of a shard with their stored views and targets, each compared with what the store says of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from storage.errors import IdentityError, UserError
from storage.rng import generator
from storage.store.banks import BankView, read_views
from storage.store.codecs import Codec
from storage.store.markers import Marker, Task
from storage.views.draw import draw_view
from storage.views.mixing import mix_images
from storage.views.render import BadImage, decode, render
from storage.views.view import Mix
from student.data.batch import map_arrays

if TYPE_CHECKING:
    from storage.store.arrays import StoredArray
    from student.data.shuffle import Segment
    from student.data.source import Source

Arrays = dict[str, np.ndarray]

_Look = Callable[[int], tuple[Mix | None, np.ndarray]]  # a sample's index -> its mixing, its pixels before that

BlockPart = tuple[Arrays, dict[str, Arrays]]  # images, labels and ids of some samples; target id -> its arrays


class BlockReader:
    """Reads segments of blocks: images rendered, signatures compared, targets beside them.

    Args:
        source: where the samples are.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self._samples = {shard.id: len(shard) for shard in source.shards}
        self.marker = functools.lru_cache(maxsize=4096)(self._marker)

    def _marker(self, task: Task) -> Marker:
        source = self.source
        assert source.store is not None
        marker = source.store.marker(task)
        codec = Codec("raw", (source.policy.size, source.policy.size, 3), 2) if task.id == source.pixels else None
        marker.require(self._samples[task.shard], source.targets.get(task.id, codec))
        if task.kind == "target":
            bank = self.marker(Task("bank", str(source.bank), task.shard, task.view))
            digest, recorded = bank.bank.views_digest, marker.target.bank_views
            if recorded != digest:
                hint = "These targets were made from other views than the bank has now."
                raise IdentityError(marker.name, "bank_views", digest, recorded, hint)
        return marker

    def read(self, segment: Segment, view: int) -> BlockPart:
        """The samples of a segment in one view: images, labels and ids, and the arrays of each target.

        `mix_labels` and `mix_weights`: labels of the images that are mixed in, and their share, 0 where none is.

        Raises:
            IdentityError: an image, key, label or pixel is not what it was.
            DamageError: an object of the store is missing or damaged.
        """
        index, samples = self.source.shards[segment.shard].index, segment.samples
        images, mixes = self._images(segment, view)
        partners = [mix.partner if mix else i for mix, i in zip(mixes, samples, strict=True)]
        labels, mix_labels = ([index.labels[i] for i in numbers] for numbers in (samples, partners))
        arrays = {
            "images": images,
            "labels": np.array([-1 if label is None else label for label in labels], np.int64),
            "mix_labels": np.array([-1 if label is None else label for label in mix_labels], np.int64),
            "mix_weights": np.array([mix.amount / 256 if mix else 0 for mix in mixes], np.float32),
            "ids": np.stack(np.broadcast_arrays(segment.shard, samples, view), 1, dtype=np.int64),
        }
        return arrays, self.targets(segment, view)

    def targets(self, segment: Segment, view: int) -> dict[str, Arrays]:
        """Target id -> its arrays for the samples of a segment in one view. Raises DamageError."""
        source, shard = self.source, self.source.shards[segment.shard]
        samples = segment.samples if source.permute is None else _permuted(source.permute, shard.id, segment)
        targets: dict[str, Arrays] = {}
        for target in source.targets:
            arrays = self.marker(Task("target", target, shard.id, view)).arrays
            targets[target] = {name: _rows(array, samples) for name, array in arrays.items()}
        return targets

    def _images(self, segment: Segment, view: int) -> tuple[np.ndarray, list[Mix | None]]:
        """The view images of a segment, uint8 `[n, S, S, 3]`, and how each was mixed with its partner."""
        source, shard = self.source, self.source.shards[segment.shard]
        if source.bank is None:
            look = self._fresh(segment, view)
        else:
            block = shard.index.block(segment.block)
            stored = read_views(self.marker(Task("bank", source.bank, shard.id, view)), block.start, block.stop)
            if source.pixels is not None:
                pixels = self.marker(Task("target", source.pixels, shard.id, view)).arrays["data"]
                return _rows(pixels, segment.samples), [stored.view(int(i)).mix for i in segment.samples]
            look = self._replayed(segment, view, stored)
        images, mixes = [], []
        for i in segment.samples:
            mix, own = look(int(i))
            images.append(mix_images(own, look(mix.partner)[1], mix) if mix else own)
            mixes.append(mix)
        return np.stack(images), mixes

    def _replayed(self, segment: Segment, view: int, stored: BankView) -> _Look:
        """A sample's mixing and its own pixels, rendered again from the stored view; each sample once."""
        source, shard = self.source, self.source.shards[segment.shard]
        mixes = {int(i): stored.view(int(i)).mix for i in segment.samples}
        needed = {*mixes, *(mix.partner for mix in mixes.values() if mix)}
        span = range(min(needed), max(needed) + 1)
        samples = shard.read(span)
        where = f"{shard.url}, bank {source.bank}, view {view}"

        @functools.cache
        def look(i: int) -> tuple[Mix | None, np.ndarray]:
            sample = samples[i - span.start]
            return mixes.get(i), stored.replay(i, sample, sample.image, source.policy.size, where)

        return look

    def _fresh(self, segment: Segment, view: int) -> _Look:
        """A sample's mixing and its own pixels, in a view that is drawn now; each sample once."""
        source, shard = self.source, self.source.shards[segment.shard]
        block = shard.index.block(segment.block)
        span = block if source.policy.mixes else range(int(segment.samples[0]), int(segment.samples[-1]) + 1)
        samples = shard.read(span)

        @functools.cache
        def look(i: int) -> tuple[Mix | None, np.ndarray]:
            sample = samples[i - span.start]
            try:
                image = decode(sample.image)
            except BadImage as error:
                raise UserError(
                    f"{shard.url}: key {sample.key!r}: {error}\n  Mend or remove the image and pack again"
                ) from None
            drawn = draw_view(source.policy, sample.key, view, image.size, i=i, block=block)
            return drawn.mix, render(image, drawn, source.policy.size)

        return look


def _rows(array: StoredArray, samples: np.ndarray) -> np.ndarray:
    """Some samples of one block, `[n, …]`. Raises DamageError."""
    first, stop = int(samples.min()), int(samples.max()) + 1
    rows = array.read(first, stop)
    # copied only where samples between them are left out, or they stand in another order
    return rows if np.array_equal(samples, np.arange(first, stop)) else rows[samples - first]


def _permuted(seed: int, shard: str, segment: Segment) -> np.ndarray:
    """For each sample of a segment another valid one of its block, by a fixed derangement; its own if it is alone."""
    valid = segment.samples if segment.valid is None else segment.valid
    permuted, chance = valid.copy(), generator("permuted targets", seed, shard, segment.block)
    for i in range(len(permuted) - 1, 0, -1):  # Sattolo's algorithm: one cycle through all, so nobody stays
        j = int(chance.integers(i))
        permuted[i], permuted[j] = permuted[j], permuted[i]
    return permuted[np.searchsorted(valid, segment.samples)]


def join(parts: Sequence[BlockPart]) -> BlockPart:
    """Samples of several parts after another."""
    arrays, targets = (map_arrays(lambda *pieces: np.concatenate(pieces), *same) for same in zip(*parts, strict=True))
    return arrays, targets
