"""Verify: does every object of a store still hold what was written, and do the shards still give the same pixels?

Structure, checksums and references need the store alone; with shards, views are rendered again and their
signatures compared. Everything wrong is listed, by name; nothing is changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from storage import records
from storage.banks import bank_policy, read_views
from storage.codecs import Codec
from storage.errors import DamageError, UserError
from storage.shards import BLOCK, read_samples
from storage.store import Marker, Store, Task
from storage.views import decode


@dataclass
class Report:
    """What was looked at, what was wrong, and what is only worth knowing."""

    objects: int = 0
    views_rendered: int = 0
    failures: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def expect(self, call: Callable[[], object]) -> None:
        """Count a look, and a failure if it raises what a user can understand."""
        self.objects += 1
        try:
            call()
        except UserError as error:
            self.failures.append(str(error))


def verify(
    store: Store,
    shards: Sequence[str] = (),
    samples: int = 64,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Check a whole store, and `samples` samples of each given shard in each of its banks (all with 0)."""
    report = Report()
    _manifests(store, report)
    known = store.shard_ids()
    for shard in known:
        report.expect(lambda shard=shard: _index(store, shard))  # type: ignore[misc]
    markers = _markers(store, report, set(known), say)
    _unmarked(store, report, markers)
    _gaps(store, report, markers)
    for url in shards:
        say(f"rendering views of {url} again")
        _signatures(store, report, markers, url, samples, known)
    return report


def _manifests(store: Store, report: Report) -> None:
    for kind in ("bank", "teacher", "target"):
        for id in store.objects.names(f"{kind}s"):
            if not store.objects.names(f"{kind}s/{id}"):
                report.notices.append(f"{kind}s/{id}: an empty folder")
                continue

            def check(kind: str = kind, id: str = id) -> None:
                content = store._manifest(kind, id)
                if kind == "bank":
                    bank_policy(store, id)
                elif kind == "target":
                    if not id.endswith(records.digest_of(content["identity"])[:8]):
                        raise DamageError(f"{store.url}/targets/{id}/manifest.json: damaged: not what its id says")
                    if content["graph"] is not None:
                        store.graph(content["teacher"], content["graph"])
                    if content["teacher"] not in store.objects.names("teachers"):
                        raise DamageError(f"{store.url}/teachers/{content['teacher']}: missing")

            report.expect(check)


def _index(store: Store, shard: str) -> None:
    index = store.index(shard)
    if records.digest_of([list(index.keys), list(index.digests)])[:8] != shard.rpartition("-")[2]:
        raise DamageError(f"{store.url}/shards/{shard}.json: damaged: its keys and images are not those of its id")


def _markers(store: Store, report: Report, known: set[str], say: Callable[[str], None]) -> dict[Task, Marker]:
    markers: dict[Task, Marker] = {}
    for name in store.objects.names("done"):
        task = Task.named(name)
        if task is None:
            report.failures.append(f"{store.url}/done/{name}: no marker is called so")
            continue
        if task.shard not in known:
            report.failures.append(f"{store.url}/shards/{task.shard}.json: missing, and {name} refers to it")
        report.expect(lambda task=task: markers.update({task: store.marker(task)}))  # type: ignore[misc]
    for i, (task, marker) in enumerate(sorted(markers.items()), 1):
        say(f"checksums {i}/{len(markers)}: {task.id} {task.shard} view {task.view}")
        report.expect(lambda task=task, marker=marker: _references(store, task, marker, markers))  # type: ignore[misc]
        for array in marker.arrays.values():
            report.expect(lambda array=array: _metadata(store, array.path, array.metadata))  # type: ignore[misc]
            for number in range(len(array.lengths)):
                report.expect(lambda array=array, number=number: array.check_chunk(number))  # type: ignore[misc]
    return markers


def _references(store: Store, task: Task, marker: Marker, markers: dict[Task, Marker]) -> None:
    name = f"{store.url}/done/{task.name}"
    if task.kind == "bank":
        expected = {"parameters", "signatures"}
        if task.id not in store.objects.names("banks"):
            raise DamageError(f"{store.url}/banks/{task.id}/manifest.json: missing, and {task.name} refers to it")
    else:
        manifest = store.target(task.id)
        wanted = Codec.of(manifest).layout()
        expected = set(wanted)
        for array_name, part in wanted.items():
            if array_name in marker.arrays and marker.arrays[array_name].shape[1:] != part.shape:
                raise DamageError(f"{name}: damaged: {array_name} has not the shape that the target's manifest says")
        bank = Task("bank", manifest["identity"]["bank"], task.shard, task.view)
        if bank not in markers:
            raise DamageError(f"{store.url}/done/{bank.name}: missing or damaged, and {task.name} refers to it")
        if markers[bank].views_digest != marker.content["bank_views"]:
            raise DamageError(f"{name}: its targets were made from another bank than {bank.name} names")
    samples = {array.shape[0] for array in marker.arrays.values()}
    if samples != {store.index(task.shard).summary.samples}:
        raise DamageError(f"{name}: damaged: its arrays have {sorted(samples)} samples, the shard has others")
    if set(marker.arrays) != expected:
        raise DamageError(f"{name}: damaged: it names {sorted(marker.arrays)}, expected {sorted(expected)}")


def _metadata(store: Store, path: str, metadata: records.Record) -> None:
    name = f"{store.url}/{path}/zarr.json"
    try:
        there = json.loads(store.objects.get(f"{path}/zarr.json"))
    except FileNotFoundError:
        raise DamageError(f"{name}: missing: an array's metadata is gone") from None
    except ValueError as error:
        raise DamageError(f"{name}: damaged: not JSON ({error})") from None
    if there != metadata:
        raise DamageError(f"{name}: damaged: it differs from what its marker says")


def _unmarked(store: Store, report: Report, markers: dict[Task, Marker]) -> None:
    """Attempts without a marker: a run that was killed, or a marker that is gone. Superseded ones are garbage."""
    for kind in ("bank", "target"):
        for id in store.objects.names(f"{kind}s"):
            for shard in store.objects.names(f"{kind}s/{id}"):
                if shard == "manifest.json":
                    continue
                for view in store.objects.names(f"{kind}s/{id}/{shard}"):
                    if not view.isdigit():
                        report.notices.append(f"{kind}s/{id}/{shard}/{view}: does not belong here")
                        continue
                    task = Task(kind, id, shard, int(view))
                    attempts = store.objects.names(task.folder)
                    if task not in markers and attempts:
                        report.failures.append(
                            f"{store.url}/done/{task.name}: missing or damaged: {len(attempts)} attempt(s) at it and "
                            "none counts; the same precompute command makes it anew"
                        )
                    elif extra := [a for a in attempts if a != markers[task].content["attempt"]]:
                        report.notices.append(f"{task.folder}: {len(extra)} attempt(s) that no marker names")


def _gaps(store: Store, report: Report, markers: Iterable[Task]) -> None:
    done = set(markers)
    for id in {task.id for task in done if task.kind == "target"}:
        shards = {task.shard for task in done if task.id == id}
        report.expect(lambda id=id, shards=shards: store.views("target", id, shards, done))  # type: ignore[misc]


def _signatures(
    store: Store, report: Report, markers: dict[Task, Marker], url: str, samples: int, known: Sequence[str]
) -> None:
    try:
        index = store.require(url, known)
    except UserError as error:
        report.failures.append(str(error))
        return
    chosen = range(len(index)) if not samples else range(0, len(index), max(1, -(-len(index) // samples)))
    tasks = sorted(task for task in markers if task.kind == "bank" and task.shard == index.id)
    if not tasks:
        report.failures.append(f"{url}: no bank of this store has views of {index.id}")
    policies = {task.id: bank_policy(store, task.id) for task in tasks}
    for number in sorted({i // BLOCK for i in chosen}):
        block = index.block(number)

        def check(block: range = block) -> None:
            originals = read_samples(url, index, block)
            for i in [i for i in chosen if i in block]:
                sample = originals[i - block.start]
                image = None
                for task in tasks:
                    if i in markers[task].invalid:
                        continue
                    image = image or decode(sample.image)
                    where = f"{url}, bank {task.id}, view {task.view}"
                    views = read_views(markers[task], i, i + 1)
                    views.replay(0, sample, image, policies[task.id].size, where)
                    report.views_rendered += 1

        report.expect(check)
