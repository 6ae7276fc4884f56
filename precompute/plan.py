"""Plan: what a precompute run will take, before anything is spent: bytes, objects, hours, and what would be cheaper.

Sizes are counted from shapes and codecs; hours come from running the real engine for a while beside the store (see
`precompute/throughput.py`), reading, rendering, session and writing together. Nothing is left behind.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import shutil
import time
import uuid
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from precompute.bank_choice import candidates, settle
from precompute.record_targets import known_teacher
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
from storage.store.codecs import ArraySpec, codecs_for
from storage.store.markers import Task
from storage.store.store import Store
from storage.views.view import COLUMNS

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from precompute.request import PrecomputeRequest
    from precompute.run import PrecomputePlan
    from storage.progress import Progress
    from storage.store.manifests import TargetManifest


LOOKED_AT = 8  # shards that are read whole; the others' samples are estimated from their sizes

_BANK = {"parameters": ArraySpec("float64", (len(COLUMNS),), ()), "signatures": ArraySpec("uint32", (1,), ())}

_IN_MARKER = 8 * 4 / 3  # bytes that each chunk takes in its marker: length and checksum in base64


def plan(where: str, request: PrecomputeRequest, progress: Progress, seconds: float = 60, rate: float = 1000) -> Plan:
    """What a run would take.

    Args:
        where: of the store, which need not be there yet.
        request: as for `precompute`.
        progress: gets human-readable progress.
        seconds: to measure for at most, and never for more than about a tenth of the run; 0 leaves the hours out.
        rate: images a second that a training is to read.

    Raises:
        UserError: as a run's preparation does, and where a measured shard fails.
    """
    with staffed(request, progress) as (request, client):
        store = _existing(where)
        if store:
            known_teacher(store, request.teacher)
        shards = counted(store, request.shards, progress, request.on_decode_error == "skip")
        images = sum(shard.samples for shard in shards)
        with _scratch(where) as scratch:
            policy, views, *_ = settle(store or scratch, request)
            began = time.monotonic()
            known_targets = frozenset(store.targets() if store else ())
            request = replace(request, policy=policy, num_views=views, known_targets=known_targets)
            run = plan_precompute(scratch, request, progress, client)
            known = store is not None and all(store.objects.names(f"targets/{o.target}") for o in run.outputs)
            exporting = 0.0 if known else time.monotonic() - began  # nothing has to be exported where all are known
            done = store.done() if store else set()
            todo = sum(
                shard.samples
                for shard in shards
                for view in range(views)
                if any(task.kind == "target" and task not in done for task in _tasks(run, shard, view))
            )
            measured = measure(run, shards, todo=todo, seconds=seconds, progress=progress) if seconds else None
            targets = [_target(scratch.target(output.target), images * views) for output in run.outputs]
            overhead, records = _overhead(scratch), _records(scratch)
    parts = [*_parts(run, shards, done, overhead)]
    for key, size in records.items():
        shared = key.startswith(("banks/", "zarr.json", "README.md"))
        parts.append(_Part(size, 1, new=store is None or not _holds(store, key), shared=shared))
    common = [part for part in parts if part.shared]
    missing = MissingAmount(**_sum(part for part in parts if part.new), view_images=todo)
    hours = None
    if measured:
        indexing = measured.index_seconds_per_image * sum(shard.samples for shard in shards if not shard.id)
        work = todo / measured.view_images_per_second + indexing / measured.workers
        hours = round((exporting + work) / 3600, 5) if todo else 0.0
    sample = sum(target.bytes_per_view_image for target in targets)
    tar_bytes = sum(size_of(shard.url) for shard in shards) / max(images, 1)
    return Plan(
        **_sum(parts),
        store=where,
        bank=policy.bank,
        policy=policy,
        shards=len(shards),
        samples=images,
        estimated=sum(shard.estimated for shard in shards),
        views=views,
        graph_bytes=sum(size for key, size in records.items() if key.endswith(".onnx")),
        missing=missing,
        shared=SharedAmount(**_sum(common), missing=Amount(**_sum(part for part in common if part.new))),
        targets=targets,
        training=TrainingReads(
            images_per_second=rate,
            targets_mb_per_second=round(rate * sample / 1e6, 3),
            shards_mb_per_second=round(rate * tar_bytes / 1e6, 3),
        ),
        measured=measured,
        hours=hours,
        warnings=_warnings(where, shards, missing.bytes),
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
    shards: dict[str, PlannedShard] = {}
    for url, ids in candidates(store, urls).items() if store else ():
        if store and (shard := store.recognize(url, ids)) is not None:
            opened = shard if len(shards) < LOOKED_AT else None
            shards[url] = PlannedShard(url=url, samples=len(shard), id=shard.id, opened=opened)
    others = [url for url in urls if url not in shards]
    chosen = others[:: max(1, -(-len(others) // LOOKED_AT))]
    progress.start(f"reading {len(chosen)} of {len(urls)} shards", len(chosen))
    for url in chosen:
        shard = open_shard(url, skip=skip)
        shards[url] = PlannedShard(url=url, samples=len(shard), opened=shard)
        progress.advance(1)
    filled = [shard for shard in shards.values() if shard.samples]
    if not filled:
        raise without_samples(list(shards))
    each = sum(size_of(shard.url) for shard in filled) / sum(shard.samples for shard in filled)
    for url in urls:
        if url not in shards:
            shards[url] = PlannedShard(url=url, samples=max(1, round(size_of(url) / each)), estimated=True)
    return [shards[url] for url in urls if shards[url].samples]


# ------------------------------------------------------------------------------------------------ sizes


class _Part(NamedTuple):
    """Bytes in so many objects; whether they are still to be made, and whether all teachers over a bank share them."""

    bytes: float
    objects: int
    new: bool
    shared: bool


def _sum(parts: Iterable[_Part]) -> dict[str, int]:
    """The fields of an `Amount`."""
    parts = list(parts)
    return {"bytes": round(sum(part.bytes for part in parts)), "objects": sum(part.objects for part in parts)}


def _tasks(run: PrecomputePlan, shard: PlannedShard, view: int) -> dict[Task, dict[str, ArraySpec]]:
    """Task -> its arrays, of the bank and of each target over one view of a shard."""
    targets = {Task("target", o.target, str(shard.id), view): o.codec.layout() for o in run.outputs}
    return {Task("bank", run.policy.bank, str(shard.id), view): _BANK, **targets}


def _parts(
    run: PrecomputePlan, shards: Sequence[PlannedShard], done: Collection[Task], overhead: Mapping[str, float]
) -> Iterator[_Part]:
    """Indexes, and for each task its marker and arrays; the last chunk of an array is padded."""
    for shard in shards:
        index = len(shard.opened.index.dump()) if shard.opened is not None else 90 * shard.samples
        yield _Part(index, 1, new=shard.id is None, shared=True)
        for task, arrays in itertools.chain(*(_tasks(run, shard, view).items() for view in range(run.views))):
            size, objects = overhead.get(task.id, 4096.0), 1 + len(arrays)
            for array in arrays.values():
                each = np.dtype(array.dtype).itemsize * math.prod(array.shape)
                chunk = chunk_samples(each, shard.samples)
                chunks = -(-shard.samples // chunk)
                size, objects = size + chunks * (chunk * each + 4 + _IN_MARKER), objects + chunks
            yield _Part(size, objects, new=task not in done, shared=task.kind == "bank")


def _records(scratch: Store) -> dict[str, int]:
    """Key -> bytes of what does not depend on the shards: root, manifests and graphs; and about a card."""
    keys = [key for key in scratch.objects.walk("") if key.endswith(("manifest.json", ".onnx")) or key == "zarr.json"]
    return {**{key: scratch.objects.size(key) for key in keys}, "README.md": 2048}


def _holds(store: Store, key: str) -> bool:
    folder, _, name = key.rpartition("/")
    return name in store.objects.names(folder)


def _overhead(scratch: Store) -> dict[str, float]:
    """Bank or target -> bytes of a marker without its chunks and of the `zarr.json` of all arrays, as measured."""
    overhead: dict[str, float] = {}
    for task in sorted(scratch.done()):
        arrays = scratch.marker(task).arrays.values()
        keys = [f"done/{task.name}", *(f"{array.path}/zarr.json" for array in arrays)]
        chunks = sum(array.metadata.chunks for array in arrays)
        overhead[task.id] = sum(map(scratch.objects.size, keys)) - chunks * _IN_MARKER
    return overhead


def _target(manifest: TargetManifest, images: int) -> PlannedTarget:
    from precompute.taps import TAPS

    codec, errors, tap = manifest.codec, manifest.codec_errors, manifest.identity.tap
    maps = TAPS[tap].maps if tap in TAPS else codec.maps  # 2 for q, k and v of older stores alone
    cheaper = [
        CheaperCodec(codec=name, bytes=size * images, **error.plain())
        for name in codecs_for(codec.values)
        if (error := errors.get(name))
        and (size := replace(codec, name=name, maps=maps).sample_bytes) < codec.sample_bytes
    ]
    return PlannedTarget(
        target=manifest.id,
        sample_shape=codec.shape,
        codec=codec.name,
        bytes_per_view_image=codec.sample_bytes,
        bytes=codec.sample_bytes * images,
        error=errors.get(codec.name),
        cheaper=sorted(cheaper, key=lambda other: other.relative),
    )


# ------------------------------------------------------------------------------------------------ warnings


def _warnings(where: str, shards: Sequence[PlannedShard], new_bytes: float) -> list[str]:
    warnings = []
    indexes = [shard.opened.index for shard in shards if shard.opened is not None]
    blocks = [(index, index.block(n)) for index in indexes if index.summary.labelled for n in range(index.blocks)]
    mixes = [len({index.labels[i] for i in block}) for index, block in blocks]
    if mixes:
        count = len(classes_of(shard.url for shard in shards) or {label for index in indexes for label in index.labels})
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
