"""Plan: what a precompute run will take, before anything is spent: bytes, objects, hours, and what would be cheaper.

Sizes are counted from shapes and codecs; hours come from running the real engine for a while beside the store (see
`precompute/throughput.py`), reading, rendering, session and writing together. Nothing is left behind.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from precompute import record_targets
from precompute.bank_choice import candidates, choose_views, settle
from precompute.results import Amount, CheaperCodec, MissingAmount, Plan, PlannedTarget, SharedAmount, TrainingReads
from precompute.run import plan_precompute, staffed
from precompute.throughput import PlannedShard, measure
from storage.errors import call
from storage.objects.object_store import open_object_store
from storage.objects.urls import is_remote
from storage.shards.classes import classes_of
from storage.shards.shard import open_shard
from storage.shards.tar import size_of, without_samples
from storage.store.arrays import chunk_samples
from storage.store.codecs import ArraySpec, CodecError, codecs_for
from storage.store.markers import Task
from storage.store.store import Store
from storage.views.view import COLUMNS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from distributed import Client

    from precompute.engine.tasks import TargetOutput
    from precompute.request import PrecomputeRequest
    from storage.progress import Progress
    from storage.views.policy import Policy


LOOKED_AT = 8  # shards that are read whole; the others' samples are estimated from their sizes

_BANK = {"parameters": ArraySpec("float64", (len(COLUMNS),), ()), "signatures": ArraySpec("uint32", (1,), ())}

_IN_MARKER = 8 * 4 / 3  # bytes that each chunk takes in its marker: length and checksum in base64


def plan(where: str, wanted: PrecomputeRequest, progress: Progress, seconds: float = 60, rate: float = 1000) -> Plan:
    """What a run would take.

    Args:
        where: of the store, which need not be there yet.
        wanted: as for `precompute`.
        progress: gets human-readable progress.
        seconds: to measure for at most, and never for more than about a tenth of the run; 0 leaves the hours out.
        rate: images a second that a training is to read.

    Raises:
        UserError: as a run's preparation does, and where a measured shard fails.
    """
    with staffed(wanted, progress) as (settled, client):
        return _plan(where, settled, client, progress=progress, seconds=seconds, rate=rate)


def _plan(
    where: str, wanted: PrecomputeRequest, client: Client | None, *, progress: Progress, seconds: float, rate: float
) -> Plan:
    store = _existing(where)
    if store:
        record_targets.known_teacher(store, wanted.teacher)
    shards = counted(store, wanted.shards, progress, wanted.on_decode_error == "skip")
    policy, views = _policy(store, wanted)
    began = time.monotonic()
    with _scratch(where) as scratch:
        settled = replace(
            wanted, policy=policy, policy_fields=frozenset({"line", "size", "seed"}), num_views=views, new_bank=True
        )
        job = plan_precompute(scratch, settled, progress)
        outputs = [output for by_graph in job.by_graph.values() for output in by_graph]
        known = store is not None and all(store.objects.names(f"targets/{output.target}") for output in outputs)
        exporting = 0.0 if known else time.monotonic() - began  # nothing has to be exported where all are known
        missing = _missing(store, shards, policy.bank, outputs, views)
        todo = sum(shard.samples for shard in shards for view in range(views) if missing[shard.url, view] - {"bank"})
        measured = measure(job, shards, client, todo=todo, seconds=seconds, progress=progress) if seconds else None
        errors = {output.target: scratch.target(output.target).codec_errors for output in outputs}
        overhead, records = _overhead(scratch), _records(scratch)
    totals, shared = _sizes(shards, outputs, views, missing, overhead)
    for key, length in records.items():
        for into in (totals, shared) if key.startswith(("banks/", "zarr.json", "README.md")) else (totals,):
            into.add(length, 1, store is None or not _holds(store, key))
    images = sum(shard.samples for shard in shards)
    sample = sum(output.codec.sample_bytes for output in outputs)
    tar_bytes = sum(size_of(shard.url) for shard in shards) / max(images, 1)
    hours = None
    if measured:
        indexing = measured.index_seconds_per_image * sum(shard.samples for shard in shards if not shard.id)
        work = todo / measured.view_images_per_second + indexing / measured.workers
        hours = round((exporting + work) / 3600, 5) if todo else 0.0
    return Plan(
        store=where,
        bank=policy.bank,
        policy=policy,
        shards=len(shards),
        samples=images,
        estimated=sum(shard.estimated for shard in shards),
        views=views,
        bytes=round(totals.bytes),
        objects=totals.objects,
        graph_bytes=sum(length for key, length in records.items() if key.endswith(".onnx")),
        missing=MissingAmount(bytes=round(totals.new_bytes), objects=totals.new_objects, view_images=todo),
        shared=SharedAmount(
            bytes=round(shared.bytes),
            objects=shared.objects,
            missing=Amount(bytes=round(shared.new_bytes), objects=shared.new_objects),
        ),
        targets=[_target(output, errors[output.target], images * views) for output in outputs],
        training=TrainingReads(
            images_per_second=rate,
            targets_mb_per_second=round(rate * sample / 1e6, 3),
            shards_mb_per_second=round(rate * tar_bytes / 1e6, 3),
        ),
        measured=measured,
        hours=hours,
        warnings=_warnings(where, shards, totals.new_bytes),
    )


def _existing(where: str) -> Store | None:
    try:
        open_object_store(where).get("zarr.json")
    except (FileNotFoundError, NotADirectoryError):
        return None
    return Store.open(where)


@contextlib.contextmanager
def _scratch(where: str) -> Iterator[Store]:
    """A store beside the one that is planned, so on the same disk or bucket; removed in the end."""
    name = f"plan-{uuid.uuid4().hex[:8]}"
    made: list[Path] = []
    if is_remote(where):
        inside = "/" not in where.split("://", 1)[1].strip("/")  # a bucket's root: beside it are other buckets
        place = f"{where.rstrip('/')}{'/' if inside else '.'}{name}"
    else:  # hidden inside the folder where there is one: its parent may be another disk
        path = Path(where.removeprefix("file://")).expanduser().absolute()
        made = [parent for parent in path.parents if not parent.exists()]
        place = str(path / f".{name}" if path.is_dir() else path.parent / f".{path.name}.{name}")
    try:
        yield Store.create(place)
    finally:
        open_object_store(place).remove("")
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()


def counted(store: Store | None, urls: Sequence[str], progress: Progress, skip: bool = False) -> list[PlannedShard]:
    """The shards with samples: known ones and some others counted, the rest estimated; `skip` as `open_shard`."""
    known = candidates(store, urls) if store else {}
    shards: dict[str, PlannedShard] = {}
    for url in urls:
        shard = store.recognize(url, known[url]) if store else None
        if shard is not None:
            read = shard if len(shards) < LOOKED_AT else None
            shards[url] = PlannedShard(url=url, samples=len(shard), id=shard.id, opened=read)
    others = [url for url in urls if url not in shards]
    some = others[:: max(1, -(-len(others) // LOOKED_AT))]
    progress.start(f"reading {len(some)} of {len(urls)} shards", len(some))
    for url in some:
        shard = open_shard(url, skip=skip)
        shards[url] = PlannedShard(url=url, samples=len(shard), opened=shard)
        progress.advance(1)
    filled = [shard for shard in shards.values() if shard.samples]
    if not filled:
        raise without_samples(list(shards))
    each = sum(size_of(s.url) for s in filled) / sum(s.samples for s in filled)
    for url in (url for url in others if url not in shards):
        shards[url] = PlannedShard(url=url, samples=max(1, round(size_of(url) / each)), estimated=True)
    return [shards[url] for url in urls if shards[url].samples]


def _policy(store: Store | None, wanted: PrecomputeRequest) -> tuple[Policy, int]:
    """The policy and the number of views that a run would take."""
    if store is None:
        return wanted.policy, choose_views(None, wanted.policy, wanted.num_views)
    policy, views, _ = settle(store, wanted, candidates(store, wanted.shards))
    return policy, views


def _missing(
    store: Store | None, shards: Sequence[PlannedShard], bank: str, outputs: Sequence[TargetOutput], views: int
) -> dict[tuple[str, int], set[str]]:
    """(shard, view) -> ids of targets, and `bank` for the views themselves, that are not there yet."""
    done = store.done() if store else set()
    missing: dict[tuple[str, int], set[str]] = {}
    for shard in shards:
        for view in range(views):
            tasks = {"bank": Task("bank", bank, str(shard.id), view)}
            tasks |= {o.target: Task("target", o.target, str(shard.id), view) for o in outputs}
            missing[shard.url, view] = {name for name, task in tasks.items() if task not in done}
    return missing


# ------------------------------------------------------------------------------------------------ sizes


@dataclass(slots=True, kw_only=True)
class _Totals:
    """Bytes and objects of everything, and of what is missing."""

    bytes: float = 0
    objects: int = 0
    new_bytes: float = 0
    new_objects: int = 0

    def add(self, size: float, objects: int, new: bool) -> None:
        self.bytes, self.objects = self.bytes + size, self.objects + objects
        if new:
            self.new_bytes, self.new_objects = self.new_bytes + size, self.new_objects + objects


def _records(scratch: Store) -> dict[str, int]:
    """Key -> bytes of what does not depend on the shards: root, manifests and graphs; and about a card."""
    keys = [key for key in scratch.objects.walk("") if key.endswith(("manifest.json", ".onnx")) or key == "zarr.json"]
    return {**{key: scratch.objects.size(key) for key in keys}, "README.md": 2048}


def _holds(store: Store, key: str) -> bool:
    folder, _, name = key.rpartition("/")
    return name in store.objects.names(folder)


def _arrays(parts: dict[str, ArraySpec], samples: int) -> tuple[int, int]:
    """Bytes and number of the chunks of some arrays over a shard; the last chunk is padded."""
    size = count = 0
    for part in parts.values():
        each = np.dtype(part.dtype).itemsize * math.prod(part.shape)
        chunk = chunk_samples(each, samples)
        chunks = -(-samples // chunk)
        size, count = size + chunks * (chunk * each + 4), count + chunks
    return size, count


def _overhead(scratch: Store) -> dict[str, tuple[float, float]]:
    """Kind or target -> bytes of a marker without its chunks, and of the `zarr.json` of all arrays, as measured."""
    overhead: dict[str, tuple[float, float]] = {}
    for task in sorted(scratch.done()):
        marker = scratch.marker(task)
        chunks = sum(array.metadata.chunks for array in marker.arrays.values())
        size = scratch.objects.size(f"done/{task.name}") - chunks * _IN_MARKER
        metadata = sum(scratch.objects.size(f"{array.path}/zarr.json") for array in marker.arrays.values())
        overhead["bank" if task.kind == "bank" else task.id] = (size, metadata)
    return overhead


def _sizes(
    shards: Sequence[PlannedShard],
    outputs: Sequence[TargetOutput],
    views: int,
    missing: dict[tuple[str, int], set[str]],
    overhead: dict[str, tuple[float, float]],
) -> tuple[_Totals, _Totals]:
    """Bytes and objects of indexes, arrays and markers, and of those that other teachers over this bank share."""
    mean = sum(o[0] + o[1] for o in overhead.values()) / len(overhead) if overhead else 4096.0
    totals, shared = _Totals(), _Totals()
    for shard in shards:
        index = len(shard.opened.index.dump()) if shard.opened is not None else 90 * shard.samples
        for into in (totals, shared):
            into.add(index, 1, shard.id is None)
        for view in range(views):
            for name, parts in (("bank", _BANK), *((o.target, o.codec.layout()) for o in outputs)):
                size, chunks = _arrays(parts, shard.samples)
                own = sum(overhead[name]) if name in overhead else mean
                for into in (totals, shared) if name == "bank" else (totals,):
                    into.add(
                        size + own + chunks * _IN_MARKER, chunks + len(parts) + 1, name in missing[shard.url, view]
                    )
    return totals, shared


def _target(output: TargetOutput, errors: Mapping[str, CodecError | None], images: int) -> PlannedTarget:
    codec, cheaper = output.codec, []
    for name in codecs_for(codec.values) if errors else []:
        size = replace(codec, name=name).sample_bytes
        if size < codec.sample_bytes and (error := errors.get(name)):
            cheaper.append(CheaperCodec(codec=name, bytes=size * images, **error.plain()))
    return PlannedTarget(
        target=output.target,
        sample_shape=codec.shape,
        codec=codec.name,
        bytes_per_view_image=codec.sample_bytes,
        bytes=codec.sample_bytes * images,
        error=errors.get(codec.name),
        cheaper=sorted(cheaper, key=lambda other: other.bytes),
    )


# ------------------------------------------------------------------------------------------------ warnings


def _warnings(where: str, shards: Sequence[PlannedShard], new_bytes: float) -> list[str]:
    warnings = []
    indexes = [shard.opened.index for shard in shards if shard.opened is not None]
    mixes = [
        len({index.labels[i] for i in index.block(number)})
        for index in indexes
        if index.summary.labelled
        for number in range(index.blocks)
    ]
    if mixes:
        names = classes_of(shard.url for shard in shards)
        seen = {label for index in indexes for label in index.labels}
        count = len(names) if names else len(seen)
        if median(mixes) < min(8, count / 2):
            command = call("pack", "SHARDS", "shuffled-{000000..000009}.tar")
            warnings.append(
                f"half of the blocks hold {median(mixes):.0f} classes or fewer, of {count}: batches and mixing "
                f"partners will be alike. Shuffle the shards first: {command}"
            )
    if not is_remote(where):
        path = Path(where.removeprefix("file://")).expanduser().absolute()
        folder = next(parent for parent in (path, *path.parents) if parent.exists())
        free = shutil.disk_usage(folder).free
        if free < new_bytes:
            warnings.append(f"{folder}: {free / 1e9:.1f} GB are free, {new_bytes / 1e9:.1f} GB will be written")
    return warnings
