"""The store: one zarr hierarchy with shard indexes, banks of views, teachers and targets (docs/store-format.md)."""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from storage.errors import DamageError, IdentityError, UserError, call, did_you_mean, first_few, setting
from storage.objects import json_record
from storage.objects.object_store import ObjectStore, open_object_store
from storage.shards.index import ShardIndex, is_same_shard
from storage.shards.shard import Shard, open_shard
from storage.shards.tar import stem_of
from storage.store import manifests
from storage.store.arrays import read_written
from storage.store.manifests import BankManifest, Identity, M, TargetManifest, TeacherManifest
from storage.store.markers import FORMAT, RECOMPUTE, Kind, Marker, Task

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import dask.array

    from storage.store.codecs import Codec

# The whole content of the root's zarr.json: a constant, so that every changed bit in it is seen.
_ROOT = json_record.canonical(
    {"zarr_format": 3, "node_type": "group", "attributes": {"teacher_store": {"format": FORMAT}}}
)
_COPY = "This file is the same in all stores: copy it from another one."


class Store:
    """A store at a local folder or an fsspec URL. Cheap to open and to pickle; safe for any number of writers.

    `Store.open` and `Store.create` make one.

    Args:
        objects: where the objects of the store are read and written.
    """

    def __init__(self, objects: ObjectStore) -> None:
        self.objects = objects

    @property
    def url(self) -> str:
        """Where the store lies."""
        return self.objects.url

    @classmethod
    def create(cls, where: str | Path | ObjectStore) -> Store:
        """The store at a place; a new one where there is nothing yet.

        Args:
            where: a local folder or an fsspec URL.

        Raises:
            UserError: something else lies there.
        """
        objects = open_object_store(where) if isinstance(where, str | Path) else where
        try:
            objects.get("zarr.json")
        except FileNotFoundError:
            others = objects.names("")
            if not others:
                objects.create("zarr.json", _ROOT)
            elif not {"done", "zarr.json"} & set(others):  # zarr.json: somebody was faster
                message = f"{objects.url}: not a store: this folder has other files ({others[0]}, …)"
                raise UserError(message, hint="Give a new folder.") from None
        except NotADirectoryError:
            pass  # a file: `open` says so
        return cls.open(objects)

    @classmethod
    def open(cls, where: str | Path | ObjectStore) -> Store:
        """The store at a place.

        Args:
            where: a local folder or an fsspec URL.

        Raises:
            UserError: there is none.
            DamageError: its root is damaged, or a newer version wrote it.
        """
        objects = open_object_store(where) if isinstance(where, str | Path) else where
        url = objects.url
        try:
            root = objects.get("zarr.json")
        except FileNotFoundError:
            if "done" in objects.names(""):
                raise DamageError(f"{url}/zarr.json: missing: the root of the store is gone", hint=_COPY) from None
            raise UserError(f"{url}: there is no store here", hint=f"{call('precompute')} makes one.") from None
        except (NotADirectoryError, IsADirectoryError):
            hint = f"Give a folder: {setting('store', 'DIR')}"
            raise UserError(f"{url}: not a folder, so not a store", hint=hint) from None
        if root != _ROOT:
            newer = re.search(rb'"teacher_store":\{"format":(\d+)\}', root)
            if newer and int(newer[1]) > FORMAT:
                message = f"{url}: store format {int(newer[1])}, this version reads {FORMAT}"
                raise UserError(message, hint="Install a newer version of this package.")
            raise DamageError(f"{url}/zarr.json: damaged: it is not the root of a store", hint=_COPY)
        return cls(objects)

    # ------------------------------------------------------------------------------------ banks, teachers, targets

    def manifest(self, model: type[M], id: str) -> M:
        """The manifest of a bank, a teacher or a target. Raises DamageError."""
        key = f"{model.KIND}s/{id}/manifest.json"
        data = read_written(self.objects, key, f"a {model.KIND} that the store refers to is gone")
        return manifests.load(model, data, f"{self.url}/{key}", id)

    def _manifests(self, model: type[M]) -> dict[str, M]:
        """Id -> manifest; a folder that is still empty is somebody's who is just adding it."""
        names, folder = self.objects.names, f"{model.KIND}s"
        return {id: self.manifest(model, id) for id in names(folder) if names(f"{folder}/{id}")}

    def _known(self, model: type[M], id: str) -> M:
        known = self.objects.names(f"{model.KIND}s")
        if id not in known:
            raise UserError(f"{self.url}: no {model.KIND} is called {id!r}", hint=did_you_mean(id, known))
        return self.manifest(model, id)

    def add(self, manifest: M) -> M:
        """Record a bank, a teacher or a target; the manifest that is recorded.

        Raises:
            IdentityError: another one is recorded under this id.
        """
        self.objects.create(f"{manifest.KIND}s/{manifest.id}/manifest.json", json_record.to_json(manifest.plain()))
        return self.require_same(type(manifest), manifest.id, manifest.identity)

    def require_same(self, model: type[M], id: str, identity: Identity) -> M:
        """The recorded manifest of an id. Raises IdentityError where its identity is another."""
        manifest = self.manifest(model, id)
        recorded, requested = manifest.identity.plain(), identity.plain()
        hint, words = "", ("expected", "found")
        if model is TeacherManifest:
            hint = f"It is not the recorded teacher. Give it another name: {setting('teacher_name', f'{id}-2')}"
            words = ("the store has", "asked for")
        for field in sorted({*recorded, *requested}):
            expected, found = recorded.get(field), requested.get(field)
            if found != expected:
                raise IdentityError(f"{self.url}: {model.KIND} {id!r}", field, expected, found, hint, words)
        return manifest

    def banks(self) -> dict[str, BankManifest]:
        """The banks of views: id -> manifest."""
        return self._manifests(BankManifest)

    def bank(self, id: str) -> BankManifest:
        """The manifest of a bank. Raises UserError for an unknown id."""
        return self._known(BankManifest, id)

    def teachers(self) -> dict[str, TeacherManifest]:
        """The teachers: name -> manifest."""
        return self._manifests(TeacherManifest)

    def teacher_of(self, target: TargetManifest) -> TeacherManifest:
        """The manifest of a target's teacher; of a ready graph, the target says what it knows of the network.

        Raises:
            DamageError: the teacher's manifest is missing or damaged.
        """
        name = target.teacher
        if not self.objects.names(f"teachers/{name}"):
            raise DamageError(f"{self.url}/teachers/{name}/manifest.json: missing, and {target.id} refers to it")
        teacher = self.manifest(TeacherManifest, name)
        if target.network:
            teacher = teacher.model_copy(update=target.network.model_dump(exclude_unset=True))
        manifests.require_teacher(f"{self.url}/targets/{target.id}/manifest.json", target, teacher)
        return teacher

    def targets(self) -> dict[str, TargetManifest]:
        """The targets: id -> manifest."""
        return self._manifests(TargetManifest)

    def target(self, id: str) -> TargetManifest:
        """The manifest of a target. Raises UserError for an unknown id."""
        return self._known(TargetManifest, id)

    def add_graph(self, teacher: str, file: Path) -> str:
        """Keep an exported graph; its sha256."""
        graph = file.read_bytes()
        digest = hashlib.sha256(graph).hexdigest()
        self.objects.create(f"teachers/{teacher}/graphs/{digest}.onnx", graph)
        return digest

    def graph(self, teacher: str, digest: str) -> bytes | Path:
        """An exported graph: its file where the store is a folder, else its bytes. Raises DamageError."""
        key = f"teachers/{teacher}/graphs/{digest}.onnx"
        if file := self.objects.file(key):
            with file.open("rb") as opened:
                found = hashlib.file_digest(opened, "sha256").hexdigest()
        else:
            graph = read_written(self.objects, key, "the graph that made a target is gone")
            found = hashlib.sha256(graph).hexdigest()
        if found != digest:
            raise DamageError(f"{self.url}/{key}: damaged: its content does not agree with its name")
        return file or graph

    # ------------------------------------------------------------------------------------------ shards

    def shard_ids(self) -> list[str]:
        """The ids of all shards that the store knows."""
        return [name.removesuffix(".json") for name in self.objects.names("shards") if name.endswith(".json")]

    def index(self, shard: str) -> ShardIndex:
        """The index of a shard: its keys, labels and byte ranges. Raises DamageError."""
        key = f"shards/{shard}.json"
        name = f"{self.url}/{key}"
        index = ShardIndex.load(read_written(self.objects, key, "the index of a shard is gone"), name)
        if index.id != shard:
            raise DamageError(f"{name}: damaged: it is the index of {index.id}")
        return index

    def add_index(self, index: ShardIndex, url: str) -> None:
        """Keep a shard's index.

        Raises:
            IdentityError: the store knows the same images with other labels.
        """
        if not self.objects.create(f"shards/{index.id}.json", index.dump()):
            self._same_labels(index, url)

    def _same_labels(self, own: ShardIndex, url: str) -> None:
        for key, expected, found in zip(own.keys, self.index(own.id).labels, own.labels, strict=True):
            if found != expected:
                hint = "The labels changed since precompute. Give the shard as it was, or pack it with other keys."
                raise IdentityError(url, f"label of key {key}", expected, found, hint)

    def recognize(self, url: str, known: Sequence[str]) -> Shard | None:
        """The file as one of the `known` shards: same stem, size, first and last block; None if it is none of them."""
        stem = stem_of(url)
        alike = (self.index(id) for id in known if id.rpartition("-")[0] == stem)
        index = next((index for index in alike if is_same_shard(url, index.summary)), None)
        return None if index is None else Shard(url, index, functools.partial(self.index, index.id))

    def require(self, url: str, known: Sequence[str]) -> Shard:
        """The file as one of the `known` shards, whatever its tar headers are; or a shard without samples.

        Raises:
            IdentityError: an unknown shard, or a known name with other content.
        """
        if (recognized := self.recognize(url, known)) is not None:
            return recognized
        own = open_shard(url, skip=True)  # which keys make no sample was decided when the store was made
        if not len(own):
            return own
        if own.id in known:  # the same samples in a tar with other headers: its own ranges count
            self._same_labels(own.index, url)
            return own
        for id in sorted({task.shard for task in self.done()} - set(known)):
            if id.rpartition("-")[0] == own.summary.stem:
                raise DamageError(f"{self.url}/shards/{id}.json: missing: the index of a shard is gone")
        raise self._unknown(url, own.index, known)

    def _unknown(self, url: str, own: ShardIndex, known: Sequence[str]) -> IdentityError:
        indexes = [self.index(shard) for shard in known]
        elsewhere = {digest for index in indexes for digest in index.digests}
        shared = sum(digest in elsewhere for digest in own.digests)
        hint = (
            f"{shared} of its {len(own)} images are known in this store under other shards or positions. Targets "
            f"belong to a shard's exact content: give the shards that were precomputed, or run {call('precompute')} "
            "over these."
        )
        for index in indexes:
            if index.summary.stem == own.summary.stem:
                return IdentityError(url, *_first_difference(index, own), hint)
        return IdentityError(
            url, "shard", first_few(known, 3) or "none", own.id, hint, (f"the store {self.url} has", "this is")
        )

    # ------------------------------------------------------------------------------------------ markers

    def done(self) -> set[Task]:
        """All tasks that are complete, by one listing."""
        return {task for name in self.objects.names("done") if (task := Task.named(name))}

    def marker(self, task: Task) -> Marker:
        """The marker of a task.

        Raises:
            DamageError: missing, damaged, or another task's.
        """
        loss = "this view was not precomputed, or its marker is gone"
        return Marker(self.objects, task, read_written(self.objects, f"done/{task.name}", loss, RECOMPUTE))

    def find(self, task: Task, samples: int, codec: Codec | None = None) -> Marker | None:
        """The marker of a task if it is there and undamaged: a damaged one counts as absent and is removed.

        For writers only. Readers use `marker`, which says what is wrong, and `Marker.require`, which takes the same
        `samples` and `codec`.
        """
        key = f"done/{task.name}"
        try:
            data = self.objects.get(key)
        except FileNotFoundError:
            return None
        try:
            marker = Marker(self.objects, task, data)
            marker.require(samples, codec)
            return marker
        except DamageError:
            self.objects.discard(key, data)
            return None

    def discard(self, marker: Marker) -> None:
        """Take away a marker that is worth nothing; not one that somebody has put in its place meanwhile."""
        self.objects.discard(f"done/{marker.task.name}", json_record.to_json(marker.record.plain()))

    def views(self, kind: Kind, id: str, shards: Iterable[str], done: set[Task], most: int | None = None) -> int:
        """How many views a bank or a target has over shards: the largest count found, but at most `most`.

        Raises:
            DamageError: a marker below this count is missing.
        """
        ids = set(shards)
        complete = {(t.shard, t.view) for t in done if (t.kind, t.id) == (kind, id) and t.shard in ids}
        count = max((view for _, view in complete), default=-1) + 1
        count = min(count, most) if most else count
        if missing := sorted(set(itertools.product(ids, range(count))) - complete):
            name = f"{self.url}/done/{Task(kind, id, *missing[0]).name}"
            hint = f"Run {call('precompute')} over all shards, or use fewer views: {setting('stream.views', 'N')}"
            raise DamageError(f"{name}: missing: other shards have {count} views of this {kind}", hint=hint)
        return count

    # ------------------------------------------------------------------------------------------ for analyses

    def array(self, target: str) -> dask.array.Array:
        """A target's decoded values over all shards and views as one lazy dask array `[samples × views, …]`, f32.

        Shards are in the order of their ids, within a shard view after view. Nothing is read before it is computed.

        Args:
            target: id of the target.

        Raises:
            UserError: no view of the target is complete.
            DamageError: an object is missing or damaged; of a chunk when the array is computed.
        """
        import dask.array

        def load(marker: Marker, start: int, stop: int) -> np.ndarray:
            values: np.ndarray = codec.decode({name: array.read(start, stop) for name, array in marker.arrays.items()})
            return values

        tasks = sorted(task for task in self.done() if task.kind == "target" and task.id == target)
        codec = self.target(target).codec
        if not tasks:
            raise UserError(f"{self.url}: target {target} has no complete views yet")
        pieces = []
        for marker in [self.marker(task) for task in tasks]:
            marker.require(marker.samples, codec)
            step = min(array.metadata.chunk_shape[0] for array in marker.arrays.values())
            for start in range(0, marker.samples, step):
                stop = min(start + step, marker.samples)
                piece = dask.delayed(load, pure=True)(marker, start, stop)  # type: ignore[attr-defined]
                pieces.append(dask.array.from_delayed(piece, (stop - start, *codec.shape), np.float32))  # type: ignore[no-untyped-call]
        return dask.array.concatenate(pieces)  # type: ignore[no-untyped-call, no-any-return]


def _first_difference(known: ShardIndex, own: ShardIndex) -> tuple[str, object, object]:
    for i, (expected, found) in enumerate(zip(known.keys, own.keys, strict=False)):
        if found != expected:
            return f"key of sample {i}", expected, found
    for key, expected, found in zip(known.keys, known.digests, own.digests, strict=False):
        if found != expected:
            return f"image digest of key {key}", expected, found
    return "samples", len(known), len(own)
