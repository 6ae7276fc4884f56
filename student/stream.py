"""The stream: images, labels and stored targets, joined by shard, sample and view, and checked when they are read.

`Stream` stands alone: anybody's training loop can iterate it. What it yields depends on (shards, seed, epoch, lanes,
window, batch) alone, not on workers, ranks or where it was started.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from storage import codecs
from storage.banks import bank_policy, read_views
from storage.errors import IdentityError, UserError
from storage.policies import Policy
from storage.shards import BLOCK, ShardIndex, cached_index, expand, read_samples, require_labels
from storage.store import Marker, Store, Task
from storage.views import BadImage, draw, render
from storage.views import decode as decode_image
from student.order import Order, Segment, lanes_of

Arrays = dict[str, np.ndarray]


@dataclass
class Batch:
    """Some samples: their view images, labels and stored targets.

    Attributes:
        images: uint8 `[B, S, S, 3]`, the pixels that the teacher saw.
        labels: int64 `[B]`; −1 where the shards have none.
        ids: int64 `[B, 3]`: number of the shard in the stream, index in the shard, view.
        targets: target id -> the codec's arrays, each `[B, …]`.
        codecs: target id -> codec.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    targets: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    codecs: dict[str, str] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device."""
        targets = {
            t: {n: a.to(device, non_blocking=True) for n, a in arrays.items()} for t, arrays in self.targets.items()
        }
        return Batch(self.images.to(device), self.labels.to(device), self.ids, targets, self.codecs)

    def target(self, id: str) -> Tensor:
        """A target's decoded values, f32 `[B, …]`."""
        values: Tensor = codecs.decode(self.codecs[id], self.targets[id])
        return values

    def pixels(self, mean: Sequence[float], std: Sequence[float]) -> Tensor:
        """Normalised images f32 `[B, 3, S, S]`, for a network's input."""
        x = self.images.permute(0, 3, 1, 2).float() / 255
        shape = (1, 3, 1, 1)
        return (x - x.new_tensor(mean).view(shape)) / x.new_tensor(std).view(shape)


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
    """

    urls: tuple[str, ...]
    shards: tuple[str, ...]
    policy: Policy
    store: Store | None = None
    bank: str | None = None
    targets: Mapping[str, str] = field(default_factory=dict, hash=False)


class BlockReader:
    """Reads segments of blocks: images rendered, signatures compared, targets beside them."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.index = functools.lru_cache(maxsize=64)(self._index)
        self.marker = functools.lru_cache(maxsize=256)(self._marker)

    def _index(self, shard: int) -> ShardIndex:
        url, expected = self.source.urls[shard], self.source.shards[shard]
        store = self.source.store
        index = (store.recognise(url, [expected]) if store else None) or cached_index(url)
        if index.id != expected:
            raise IdentityError(url, "shard", expected, index.id, "The file changed while it was in use.")
        return index

    def _marker(self, task: Task) -> Marker:
        assert self.source.store is not None
        marker = self.source.store.marker(task)
        if task.kind == "target":
            bank = self.marker(Task("bank", str(self.source.bank), task.shard, task.view))
            if marker.content["bank_marker"] != bank.digest:
                name = f"{self.source.store.url}/done/{task.name}"
                raise IdentityError(
                    name, "bank_marker", bank.digest, marker.content["bank_marker"],
                    "These targets were made from other views than the bank has now.",
                )  # fmt: skip
        return marker

    def read(self, segment: Segment, view: int) -> tuple[Arrays, dict[str, Arrays]]:
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
                images[row] = there.replay(int(i), samples[i], samples[i].image, side, where, self._made_with)
            for target in source.targets:
                marker = self.marker(Task("target", target, shard, view))
                targets[target] = {
                    name: array.read(span.start, span.stop)[chosen] for name, array in marker.arrays.items()
                }
        else:
            for row, i in enumerate(chosen):
                try:
                    image = decode_image(samples[i].image)
                except BadImage as error:
                    raise UserError(f"{url}: key {samples[i].key!r}: {error}") from None
                drawn = draw(source.policy, samples[i].key, view, image.size)
                images[row] = render(image, drawn, side)
        labels = np.array([-1 if samples[i].label is None else samples[i].label for i in chosen], np.int64)
        ids = np.stack([np.full(len(chosen), segment.shard), segment.samples, np.full(len(chosen), view)], 1)
        return {"images": images, "labels": labels, "ids": ids.astype(np.int64)}, targets

    @functools.cached_property
    def _made_with(self) -> dict[str, Any]:
        assert self.source.store is not None
        renderer: dict[str, Any] = self.source.store.banks()[str(self.source.bank)]["renderer"]
        return renderer


class _Lane:
    """One lane from some batch on: gives its share of batch after batch."""

    def __init__(self, reader: BlockReader, order: Order, views: int | None, epoch: int, lane: int, start: int) -> None:
        self.reader, self.order, self.views, self.epoch = reader, order, views, epoch
        self.windows = order.lane(epoch, lane, start)
        self.rows = np.zeros(0, np.int64)
        self.arrays: Arrays = {}
        self.targets: dict[str, Arrays] = {}

    def take(self) -> tuple[Arrays, dict[str, Arrays]]:
        """The lane's share of the next batch."""
        parts: list[tuple[Arrays, dict[str, Arrays]]] = []
        need = self.order.share
        while need:
            if not len(self.rows):
                self._load(*next(self.windows))
            rows, self.rows = self.rows[:need], self.rows[need:]
            need -= len(rows)
            parts.append((
                {name: array[rows] for name, array in self.arrays.items()},
                {t: {name: array[rows] for name, array in arrays.items()} for t, arrays in self.targets.items()},
            ))  # fmt: skip
        return parts[0] if len(parts) == 1 else _join(parts)

    def _load(self, segments: list[Segment], order: np.ndarray) -> None:
        self.arrays, self.targets = {}, {}  # free the last window before the next one is read
        read = []
        for segment in segments:
            view = self.epoch
            if self.views is not None:
                view = self.order.view(self.epoch, segment.shard, segment.block, self.views)
            read.append(self.reader.read(segment, view))
        self.arrays, self.targets = _join(read)
        self.rows = order


def _join(parts: Sequence[tuple[Arrays, dict[str, Arrays]]]) -> tuple[Arrays, dict[str, Arrays]]:
    """Samples of several parts after another."""
    first, targets = parts[0]
    arrays = {name: np.concatenate([part[0][name] for part in parts]) for name in first}
    joined = {
        t: {name: np.concatenate([part[1][t][name] for part in parts]) for name in names}
        for t, names in targets.items()
    }
    return arrays, joined


class _Parts(IterableDataset[list[tuple[Arrays, dict[str, Arrays]]]]):
    """What one loader worker yields: for every batch, the shares of its lanes."""

    def __init__(self, source: Source, order: Order, views: int | None, rank: int, ranks: int, place: Tensor) -> None:
        self.source, self.order, self.views, self.rank, self.ranks = source, order, views, rank, ranks
        self.place = place  # shared memory: the epoch and the batch to begin with
        self.reader: BlockReader | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "reader": None}

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        epoch, start = (int(n) for n in self.place)
        self.reader = self.reader or BlockReader(self.source)
        try:
            mine = lanes_of(self.order.lanes, self.rank, self.ranks, worker, workers)
            lanes = [_Lane(self.reader, self.order, self.views, epoch, lane, start) for lane in mine]
            for _ in range(start, self.order.steps):
                yield [lane.take() for lane in lanes]
        except UserError as error:  # torch would turn it into a traceback in a string
            yield error


class Stream(IterableDataset[Batch]):
    """Batches of images, labels and stored targets, in an order that depends on nothing but its arguments.

    Args:
        shards: patterns of shards, as `storage.shards.expand` takes.
        batch: the global batch size; with several ranks each yields its share of it.
        store: a store or its place; without one, views are drawn afresh in each epoch (their number is the epoch).
        targets: ids of targets of that store.
        policy: of fresh views; with a store, the bank's counts.
        bank: id of the store's bank; needed only where there are no targets to tell it.
        views: how many views of the bank are used; by default all that every target has.
        seed: of the order.
        lanes: L; by default the largest power of two that divides batch/8, within 8 and 128.
        window: blocks that a lane shuffles together.
        workers: loader processes, at most one a lane; 0 reads in this process.
        rank: of this process in `torch.distributed`.
        ranks: how many processes share each batch.
        labels: whether unlabelled shards are refused.
        memory: bytes that may be held in lanes; by default half of the machine's.

    Raises:
        UserError: fewer samples than a batch, lanes that do not fit, too little memory, a missing label.
        IdentityError: a shard that the store does not know, or knows with other content.
        DamageError: a view that was not precomputed, or a damaged object.
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        *,
        batch: int,
        store: Store | str | Path | None = None,
        targets: Sequence[str] = (),
        policy: Policy | None = None,
        bank: str | None = None,
        views: int | None = None,
        seed: int = 0,
        lanes: int | None = None,
        window: int = 4,
        workers: int = 0,
        rank: int = 0,
        ranks: int = 1,
        labels: bool = True,
        memory: int | None = None,
    ) -> None:
        urls = expand(shards)
        opened = Store.open(store) if isinstance(store, str | Path) else store
        if opened is None:
            if targets or policy is None:
                raise UserError("a stream needs a store with targets, or a policy for fresh views")
            self.views: int | None = None
            self.source, sizes = _fresh(urls, policy, labels)
            invalid: dict[int, frozenset[int]] = {}
        else:
            self.source, sizes = _stored(opened, urls, targets, bank, labels)
            self.views, invalid = _views(self.source, views)
        blocks = []
        for shard, count in enumerate(sizes):
            bad = invalid.get(shard, frozenset())
            for number, start in enumerate(range(0, count, BLOCK)):
                samples = np.array([i for i in range(start, min(start + BLOCK, count)) if i not in bad], np.int64)
                if len(samples):
                    blocks.append((shard, number, samples))
        self.order = Order(blocks, batch, seed, lanes, window)
        self.own = lanes_of(self.order.lanes, rank, ranks)
        self.workers = min(workers, len(self.own))
        self.notices = []
        if workers > self.workers:
            self.notices.append(
                f"{workers} loader workers were asked for, {self.workers} lanes need no more than that many"
            )
        self.memory = self._check_memory(memory)
        self._place = torch.zeros(2, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        parts = _Parts(self.source, self.order, self.views, rank, ranks, self._place)
        self._loader = DataLoader(
            parts,
            batch_size=None,
            num_workers=self.workers,
            collate_fn=_tensors,
            multiprocessing_context="spawn" if self.workers else None,
            persistent_workers=bool(self.workers),
        )
        self._next_epoch = 0

    def _check_memory(self, budget: int | None) -> int:
        """Bytes that full lanes hold at most."""
        sample = 3 * self.source.policy.size**2
        if self.source.store is not None:
            for target, codec in self.source.targets.items():
                manifest = self.source.store.target(target)
                layout = codecs.layout(codec, tuple(manifest["sample_shape"]), manifest["maps"])
                sample += sum(int(np.dtype(kind).itemsize * np.prod(shape)) for kind, shape in layout.values())
        need = len(self.own) * self.order.window * BLOCK * sample
        budget = budget or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        if need > budget:
            raise UserError(
                f"the lanes would hold {need / 2**30:.1f} GiB ({len(self.own)} lanes × {self.order.window} blocks × "
                f"{BLOCK} samples × {sample / 1024:.0f} KiB), {budget / 2**30:.1f} GiB are allowed; lower "
                "stream.window or stream.lanes, or raise stream.memory"
            )
        return need

    def __len__(self) -> int:
        return self.order.steps

    def __iter__(self) -> Iterator[Batch]:
        """One epoch after another: epoch 0 the first time it is iterated, then 1, 2, …."""
        if get_worker_info() is not None:
            raise UserError("a Stream starts its own workers: give workers=N to it, and none to a DataLoader around it")
        epoch, self._next_epoch = self._next_epoch, self._next_epoch + 1
        return self.epoch(epoch)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from batch `start` on."""
        self._place[0], self._place[1] = epoch, start
        parts = iter(self._loader)
        workers = max(1, self.workers)
        for _ in range(start, self.order.steps):
            by_lane: dict[int, Any] = {}
            for worker in range(workers):
                shares = next(parts)
                if isinstance(shares, UserError):
                    raise shares
                by_lane.update(zip(self.own[worker::workers], shares, strict=True))
            yield self._batch([by_lane[lane] for lane in self.own])

    def _batch(self, shares: Sequence[Any]) -> Batch:
        arrays = {name: torch.cat([share[0][name] for share in shares]) for name in ("images", "labels", "ids")}
        targets = {
            t: {name: torch.cat([share[1][t][name] for share in shares]) for name in names}
            for t, names in shares[0][1].items()
        }
        return Batch(**arrays, targets=targets, codecs=dict(self.source.targets))


def _tensors(shares: Any) -> Any:
    """Arrays as tensors, so that workers hand them over in shared memory."""
    if isinstance(shares, UserError):
        return shares

    def convert(arrays: Arrays) -> dict[str, Tensor]:
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    return [(convert(arrays), {t: convert(a) for t, a in targets.items()}) for arrays, targets in shares]


def _fresh(urls: Sequence[str], policy: Policy, labels: bool) -> tuple[Source, list[int]]:
    ids, sizes = _recognise(urls, cached_index, labels)
    return Source(tuple(urls), tuple(ids), policy), sizes


def _recognise(urls: Sequence[str], index_of: Callable[[str], ShardIndex], labels: bool) -> tuple[list[str], list[int]]:
    """Ids and numbers of samples of shards; their indexes, which are large, are read again where they are needed."""
    ids, sizes = [], []
    for url in urls:
        index = index_of(url)
        if labels:
            require_labels(url, index)
        ids.append(index.id)
        sizes.append(len(index))
    return ids, sizes


def _stored(
    store: Store, urls: Sequence[str], targets: Sequence[str], bank: str | None, labels: bool
) -> tuple[Source, list[int]]:
    known = store.shard_ids()
    ids, sizes = _recognise(urls, lambda url: store.require(url, known), labels)
    manifests = {target: store.target(target) for target in targets}
    banks = sorted({manifest["identity"]["bank"] for manifest in manifests.values()} | ({bank} if bank else set()))
    if len(banks) != 1:
        raise UserError(
            f"{store.url}: all targets of a training run share one bank, these name {', '.join(banks) or 'none'}"
        )
    source = Source(
        tuple(urls), tuple(ids), bank_policy(store, banks[0]), store, banks[0],
        {target: manifest["identity"]["codec"] for target, manifest in manifests.items()},
    )  # fmt: skip
    return source, sizes


def _views(source: Source, wanted: int | None) -> tuple[int, dict[int, frozenset[int]]]:
    """How many views are used, and the invalid samples of each shard."""
    store, bank = source.store, str(source.bank)
    assert store is not None
    done = store.done()
    if source.targets:
        count = min(store.views(target, source.shards, done) for target in source.targets)
    else:
        there = [max((t.view + 1 for t in done if t.kind == "bank" and t.id == bank and t.shard == shard), default=0)
                 for shard in source.shards]  # fmt: skip
        count = min(there)
    if wanted is not None and wanted > count:
        raise IdentityError(f"{store.url}: bank {bank}", "stream.views", f"at most {count}", wanted)
    count = wanted or count
    if not count:
        what = next(iter(source.targets), bank)
        raise UserError(f"{store.url}: no view of {what} is there for these shards; run precompute over them first")
    invalid = {n: store.marker(Task("bank", bank, shard, 0)).invalid for n, shard in enumerate(source.shards)}
    return count, invalid


def evaluation_batches(urls: Sequence[str], policy: Policy, batch: int) -> Iterator[Batch]:
    """Every sample of labelled shards once, in order, in the one view of a policy without chance."""
    for shard, url in enumerate(urls):
        source, _ = _fresh([url], policy, labels=True)
        reader = BlockReader(source)
        index = reader.index(0)
        held: list[tuple[Arrays, dict[str, Arrays]]] = []
        for number in range(index.blocks):
            arrays, targets = reader.read(Segment(0, number, np.array(index.block(number))), 0)
            arrays["ids"][:, 0] = shard
            held.append((arrays, targets))
            if sum(len(part[0]["labels"]) for part in held) >= batch or number == index.blocks - 1:
                joined, _ = _join(held)
                images, labels, ids = (torch.from_numpy(joined[name]) for name in ("images", "labels", "ids"))
                yield Batch(images, labels, ids)
                held = []
