"""Shards as handles: a shard is opened once, and whoever reads it is given the handle."""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from storage.errors import IdentityError, UserError, call
from storage.shards.index import ShardIndex, cached_index, read_samples
from storage.shards.patterns import expand
from storage.shards.tar import Sample, without_samples

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

OPEN_INDEXES = 256  # of a process: an index takes some hundred bytes a sample


class Shard:
    """A shard that was recognized: its URL and its index.

    A handle is small, also when it is pickled. A process keeps the indexes that it used last; another one is read again
    where it is needed.

    Args:
        url: of the tar.
        index: of the tar.
        read_index: reads the index again; it can be pickled.
    """

    __slots__ = ("__weakref__", "_read_index", "summary", "url")

    def __init__(self, url: str, index: ShardIndex, read_index: Callable[[], ShardIndex]) -> None:
        self.url, self.summary, self._read_index = url, index.summary, read_index
        _keep(self, index)

    @property
    def id(self) -> str:
        """What identifies its content: `{stem}-{digest8}`."""
        return self.summary.id

    def __len__(self) -> int:
        return self.summary.samples

    @property
    def index(self) -> ShardIndex:
        """Keys, labels, digests and byte ranges of its samples.

        Raises:
            IdentityError: the file changed while it was in use.
            DamageError: the index is gone from its store, or damaged.
        """
        with _lock:
            index = _indexes.pop(self, None)
        if index is None:
            index = self._read_index()
            if index.id != self.id:
                raise IdentityError(self.url, "shard", self.id, index.id, "The file changed while it was in use.")
        _keep(self, index)
        return index

    def read(self, indices: range) -> list[Sample]:
        """Consecutive samples, by one ranged read, compared with the index; errors as `read_samples`."""
        return read_samples(self.url, self.index, indices)


_lock = threading.Lock()
_indexes: WeakKeyDictionary[Shard, ShardIndex] = WeakKeyDictionary()  # those used last come last


def _keep(shard: Shard, index: ShardIndex) -> None:
    with _lock:
        _indexes[shard] = index
        while len(_indexes) > OPEN_INDEXES:
            del _indexes[next(iter(_indexes))]


def open_shard(url: str, *, skip: bool = False) -> Shard:
    """A shard by itself, without a store: arguments and errors as `cached_index`."""
    return Shard(url, cached_index(url, skip=skip), functools.partial(cached_index, url, trust=True, skip=True))


def open_shards(
    shards: str | Sequence[str] | Sequence[Shard], say: Callable[[str], None] = lambda _line: None
) -> list[Shard]:
    """The shards that have samples.

    Args:
        shards: patterns, as `expand` takes; or shards that are open already.
        say: told of each shard without samples.

    Raises:
        UserError: no shard has samples; as `expand` and `cached_index`.
    """
    items = [shards] if isinstance(shards, str) else shards
    opened = [item for item in items if isinstance(item, Shard)]
    if len(opened) < len(items):
        opened = [open_shard(url) for url in expand([item for item in items if isinstance(item, str)])]
    for shard in opened:
        if not len(shard):
            say(f"{shard.url}: no samples in it")
    filled = [shard for shard in opened if len(shard)]
    if opened and not filled:
        raise without_samples([shard.url for shard in opened])
    return filled


def require_labels(shard: Shard, classes: int | None = None) -> None:
    """UserError, with a key, where a sample has no label, or one that there is no class for."""
    url, index = shard.url, shard.index
    if not index.summary.labelled:
        key = index.keys[index.labels.index(None)]
        needed = "a loss or an evaluation needs labels: a shard has them for all of its samples or for none"
        packed = call("pack", "labeled", "labeled-shards/train-000000.tar", val_fraction=0.1)
        hint = f"Pack images in one folder per class, or a CSV with the columns path and label: {packed}"
        raise UserError(f"{url}: key {key!r} has no label (.cls), and {needed}", hint=hint)
    highest = max((label for label in index.labels if label is not None), default=-1)
    if classes is not None and highest >= classes:
        key = index.keys[index.labels.index(highest)]
        raise UserError(f"{url}: key {key!r} has label {highest}, there are classes 0 to {classes - 1}")
