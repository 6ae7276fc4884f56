"""The stream: images, labels and stored targets, joined by shard, sample and view, and checked when they are read.

`Stream` stands alone: any training loop can iterate it. What it yields depends on (shards, seed, epoch, lanes,
shuffle_blocks, batch_size) alone, not on workers, ranks or where it was started. Trainers save and restore it as they
do other data loaders (torchdata's StatefulDataLoader, streaming, litdata): by `set_epoch`, `state_dict` and
`load_state_dict`.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from storage.constants import BLOCK
from storage.errors import IdentityError, UserError
from storage.memory import memory_limit
from storage.objects.json_record import digest_of
from storage.progress import size_text
from storage.shards.shard import Shard, require_labels
from storage.shards.tar import without_samples
from storage.store.store import Store
from student.data.batch import Batch
from student.data.shuffle import BlockShuffle, lanes_of
from student.data.source import Shards, Source, opened, refuse_twice, stored
from student.data.worker_watch import started, watched
from student.data.workers import LaneReader, ReadPlan, dealt_back, leave_at_once

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from multiprocessing.process import BaseProcess

    from storage.views.policy import Policy


class Stream(IterableDataset[Batch]):
    """Batches of images, labels and stored targets, in an order that depends on nothing but its arguments.

    Args:
        shards: patterns of shards, as `train-{000000..000009}.tar`.
        batch_size: of all ranks together; each rank yields its share of it.
        store: a store or its place; without one, views are drawn afresh in each epoch (their number is the epoch).
        targets: ids of targets of that store.
        policy: of fresh views; with a store, the bank's counts.
        bank: id of the store's bank; needed only where there are no targets to tell it.
        views: how many views of the bank are used; by default all that every target has.
        seed: of the order.
        lanes: L; by default the largest power of two that divides batch/8, within 8 and 128,
            and a lane for each sample of a smaller batch.
        shuffle_blocks: blocks that a lane shuffles together.
        workers: loader processes, at most one a lane; 0 reads in this process.
        rank: of this process in `torch.distributed`.
        world_size: how many processes share each batch.
        labels: whether unlabeled shards are refused.
        classes: how many classes there are; higher labels are refused.
        memory: bytes that may be held in lanes; by default half of the machine's, shared by the ranks on it.
        permute: a control: targets of other images of the same block, by a fixed derangement of this seed.

    Raises:
        UserError: fewer samples than a batch, lanes that do not fit, too little memory, a missing label.
        IdentityError: a shard that the store does not know, or knows with other content.
        DamageError: a view that was not precomputed, or a damaged object.
    """

    def __init__(
        self,
        shards: Shards,
        *,
        batch_size: int,
        store: Store | str | Path | None = None,
        targets: Sequence[str] = (),
        policy: Policy | None = None,
        bank: str | None = None,
        views: int | None = None,
        seed: int = 0,
        lanes: int | None = None,
        shuffle_blocks: int = 4,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        labels: bool = True,
        classes: int | None = None,
        memory: int | None = None,
        permute: int | None = None,
    ) -> None:
        if isinstance(store, str | Path):
            store = Store.open(store)
        if store is None and (targets or policy is None):
            raise UserError("a stream needs a store with targets, or a policy for fresh views")
        if store is None and (views is not None or bank is not None):
            raise UserError("bank and views speak of a store, and none was given")
        self.label_counts: Counter[int] = Counter()
        filled, empty = list[Shard](), list[Shard]()
        flaws = 0  # keys that make no sample
        for shard in opened(shards, store):
            flaws += len(shard.index.left_out)
            if labels:
                require_labels(shard, classes)
                self.label_counts.update(label for label in shard.index.labels if label is not None)
            (filled if len(shard) else empty).append(shard)
        if not filled:
            raise without_samples([shard.url for shard in empty])
        refuse_twice(filled)
        self.views: int | None = None
        invalid: Sequence[Sequence[int]] = [[]] * len(filled)
        if store is not None:
            source, self.views, invalid = stored(store, filled, targets, bank, views)
        elif policy is not None:
            source = Source(shards=tuple(filled), policy=policy)
        self.source = replace(source, permute=permute)
        blocks = []
        for number, shard in enumerate(filled):
            for block, start in enumerate(range(0, len(shard), BLOCK)):
                samples = np.setdiff1d(np.arange(start, min(start + BLOCK, len(shard))), invalid[number])
                if len(samples):
                    blocks.append((number, block, samples))
        self.order = BlockShuffle(blocks, batch_size, seed, lanes, shuffle_blocks)
        self.own = lanes_of(self.order.lanes, rank, world_size)
        self.workers = min(workers, len(self.own))
        alone = sum(len(samples) == 1 for *_, samples in blocks) if permute is not None else 0
        started_only = f"stream.workers={workers}: only {self.workers} are started, one for each of stream.lanes"
        notices = {
            f"{len(empty)} shard(s) have no samples": empty,
            f"{flaws:,} key(s) of the shards make no sample and are left out": flaws,
            started_only: workers > self.workers,
            f"{alone} sample(s) are alone in their blocks and keep their own targets": alone,
        }
        self.notices = [notice for notice, holds in notices.items() if holds]
        self.memory = self._check_memory(memory)
        self._start = torch.zeros(2, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        plan = ReadPlan(source=self.source, order=self.order, views=self.views, rank=rank, world_size=world_size)
        self._loader = DataLoader(
            LaneReader(plan, self._start),
            batch_size=None,
            num_workers=self.workers,
            multiprocessing_context="spawn" if self.workers else None,
            persistent_workers=bool(self.workers),
            worker_init_fn=leave_at_once,
            generator=torch.Generator(),  # its own, so that iterating draws nothing from torch's global one
        )
        self._processes: list[BaseProcess] = []
        self._generation = 0
        self._next = self._position = (0, 0)  # epoch and step: what is iterated next; what follows the last batch

    def _check_memory(self, budget: int | None) -> int:
        """Bytes that full lanes hold at most."""
        sample = 3 * self.source.policy.size**2 + sum(codec.sample_bytes for codec in self.source.targets.values())
        need = len(self.own) * self.order.shuffle_blocks * BLOCK * sample
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # ranks share a machine's memory
        budget = budget or memory_limit() // (2 * here)
        if need > budget:
            raise UserError(
                f"what is read ahead{' in each process' if here > 1 else ''} would take {size_text(need)} "
                f"({len(self.own)} lanes × {self.order.shuffle_blocks} blocks × {BLOCK} samples × "
                f"{size_text(sample)}), {size_text(budget)} are allowed; lower stream.shuffle_blocks or "
                "stream.lanes, or raise stream.memory (GiB)"
            )
        return need

    def __len__(self) -> int:
        return self.order.steps

    def __iter__(self) -> Iterator[Batch]:
        """The epoch that is next: 0, then 1, 2, …, or the one that was set; after `load_state_dict` the rest of it."""
        return self.epoch(*self._next)

    def set_epoch(self, epoch: int) -> None:
        """Iterate this epoch next: from its first batch, or from the step of a state of it that was just loaded."""
        if epoch != self._next[0]:
            self._next = (epoch, 0)
        self._position = self._next

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, as plain data: `epoch` and `step` of the batch after the last one that was yielded.

        The other entries are what the order depends on. All are the same on every rank and with any number of workers.
        """
        epoch, step = self._position
        epoch, step = divmod(epoch * self.order.steps + step, self.order.steps)  # nothing is left: the next epoch
        return {
            "epoch": epoch,
            "step": step,
            "shards": digest_of(list(self.source.shard_ids)),
            "bank": self.source.bank or self.source.policy.bank,
            "views": self.views,
            **{name: getattr(self.order, name) for name in ("seed", "batch_size", "lanes", "shuffle_blocks")},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the stream was that gave this state: the next iteration yields the rest of its epoch.

        Raises:
            IdentityError: the state is of a stream with another order.
            UserError: it is not the state of a stream.
        """
        for name, own in self.state_dict().items():
            if name not in state:
                raise UserError(f"a stream's state has no {name!r}: give what `state_dict` of a Stream returned")
            if name not in ("epoch", "step") and state[name] != own:
                raise IdentityError("state of a stream", name, state[name], own, words=("it has", "this stream has"))
        epoch, step = state["epoch"], state["step"]
        if not (type(epoch) is int and type(step) is int and epoch >= 0 and 0 <= step < self.order.steps):
            raise UserError(f"a stream's state has epoch {epoch!r} and step {step!r}; an epoch has {len(self)} steps")
        self._next = self._position = (epoch, step)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch.

        Args:
            epoch: number of the epoch, from 0.
            start: number of the batch to begin with.

        Raises:
            UserError: a worker dies; or this is a worker of another DataLoader.
        """
        if get_worker_info() is not None:
            own = "a Stream loads by itself: Stream(…, workers=N)"
            raise UserError(f"{own}, without a DataLoader with num_workers around it")
        with self.watched():
            yield from self._epoch(epoch, start)

    def watched(self, advice: str = "start fewer workers") -> AbstractContextManager[None]:
        """Within it, the death of a worker ends in one UserError, with advice: PyTorch raises it anywhere."""
        return watched(self._processes, self.memory, advice)

    def _epoch(self, epoch: int, start: int) -> Iterator[Batch]:
        self._start[0], self._start[1] = epoch, start
        self._next, self._position = (epoch + 1, 0), (epoch, start)
        generation = self._generation = self._generation + 1
        with started(self._processes):  # once: they persist
            parts = iter(self._loader)
        workers = max(1, self.workers)
        for step in range(start, self.order.steps):
            if generation != self._generation:
                raise UserError(
                    f"epoch {epoch} of a stream cannot go on: another epoch was started since; make two streams"
                )
            # all of them, also after a failure: none is left in the middle of its start
            by_worker = [next(parts) for _ in range(workers)]
            failed = next((error for error in by_worker if isinstance(error, UserError | OSError)), None)
            if failed is not None:
                try:
                    raise failed
                finally:  # no cycle with its traceback: collecting one ends the workers' queues before the workers
                    del failed, by_worker
            self._position = (epoch, step + 1)
            batch = dealt_back(by_worker, len(self.own)) if self.workers else by_worker[0]
            del by_worker
            yield Batch(**batch, codecs=dict(self.source.targets))
