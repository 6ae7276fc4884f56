"""Verify: does every object of a store still hold what was written, and do the shards still give the same pixels?

Structure, checksums and references need the store alone; with shards, views are rendered again and their
signatures compared. Everything wrong is listed, by name; nothing is changed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from storage.constants import BLOCK
from storage.errors import DamageError, UserError, first_line
from storage.objects import json_record
from storage.shards.index import ShardIndex, read_samples
from storage.shards.tar import Sample
from storage.store.banks import BankView, bank_policy, read_views
from storage.store.codecs import Codec
from storage.store.manifests import require_id
from storage.store.markers import Marker, Task
from storage.store.store import Store
from storage.views.mixing import mix_images
from storage.views.render import decode

# Given a shard's url and index, a bank's task, and view images by the samples' indices.
Check = Callable[[str, ShardIndex, Task, dict[int, np.ndarray]], None]


@dataclass
class VerifyReport:
    """What was looked at, what was wrong, and what is only worth knowing."""

    objects: int = 0
    views_rendered: int = 0
    targets_compared: int = 0  # (target, view, sample)
    compared_with: dict[str, str] = field(default_factory=dict)  # teacher -> what its targets were compared with
    failures: list[str] = field(default_factory=list)
    spoilt: list[str] = field(default_factory=list)  # markers of what is damaged: without them it is made anew
    notices: list[str] = field(default_factory=list)

    def expect(self, call: Callable[[], object]) -> None:
        """Count a look, and a failure if it raises what a user can understand."""
        with _collecting(self):
            call()


@contextmanager
def _collecting(report: VerifyReport) -> Iterator[None]:
    """Count a failure instead of raising it."""
    report.objects += 1
    try:
        yield
    except UserError as error:
        report.failures.append(str(error))
    except OSError as error:
        report.failures.append(f"{error.filename or 'input or output'}: cannot be read: {first_line(error)}")


def verify(
    store: Store,
    shards: Sequence[str] = (),
    samples: int = 64,
    say: Callable[[str], None] = lambda _line: None,
    look: Check | None = None,
    report: VerifyReport | None = None,
) -> VerifyReport:
    """Check a whole store, and some samples of the given shards in each of their banks.

    Args:
        store: which one.
        shards: whose views are rendered again.
        samples: how many in all, spread over the shards; 0 for all of them.
        say: called with lines for people.
        look: given the view images that were rendered, uint8 [S, S, 3] by the sample's index, of each bank's task.
        report: where to add what is found.
    """
    report = VerifyReport() if report is None else report
    _manifests(store, report)
    known = store.shard_ids()
    for shard in known:
        report.expect(lambda shard=shard: _index(store, shard))  # type: ignore[misc]
    markers = _markers(store, report, set(known), say)
    _unmarked(store, report, markers)
    _gaps(store, report, markers)
    some = shards[:: max(1, -(-len(shards) // samples))] if samples else shards
    for number, url in enumerate(some):
        say(f"rendering views of {url} again")
        _replay(store, report, markers, url, known, (-(-samples // len(some)), number) if samples else None, look)
    return report


def _manifests(store: Store, report: VerifyReport) -> None:
    for kind in ("bank", "teacher", "target"):
        for id in store.objects.names(f"{kind}s"):
            if not store.objects.names(f"{kind}s/{id}"):
                report.notices.append(f"{kind}s/{id}: an empty folder")
                continue

            def check(kind: str = kind, id: str = id) -> None:
                content = store._manifest(kind, id)  # noqa: SLF001 - of any kind
                if kind == "bank":
                    bank_policy(store, id)
                elif kind == "target":
                    require_id(f"{store.url}/targets/{id}/manifest.json", content)
                    if content["graph"] is None:  # view images, which no teacher made
                        return
                    store.graph(content["teacher"], content["graph"])
                    store.teacher_of(content)

            report.expect(check)


def _index(store: Store, shard: str) -> None:
    index = store.index(shard)
    if json_record.digest_of([list(index.keys), list(index.digests)])[:8] != shard.rpartition("-")[2]:
        raise DamageError(f"{store.url}/shards/{shard}.json: damaged: its keys and images are not those of its id")


def _markers(store: Store, report: VerifyReport, known: set[str], say: Callable[[str], None]) -> dict[Task, Marker]:
    markers: dict[Task, Marker] = {}
    for name in store.objects.names("done"):
        task = Task.named(name)
        if task is None:
            report.failures.append(f"{store.url}/done/{name}: does not belong here")
            continue
        if task.shard not in known:
            report.failures.append(f"{store.url}/shards/{task.shard}.json: missing, and {name} refers to it")
        report.expect(lambda task=task: markers.update({task: store.marker(task)}))  # type: ignore[misc]
        if task not in markers:
            report.spoilt.append(f"{store.url}/done/{name}")
    manifest = functools.cache(store.target)  # read once, not for every marker
    samples = functools.cache(lambda shard: store.index(shard).summary.samples)
    for i, (task, marker) in enumerate(sorted(markers.items()), 1):
        say(f"checksums {i}/{len(markers)}: {task.id} {task.shard} view {task.view}")
        with _collecting(report):
            _references(store, task, marker, markers, manifest, samples)
        before = len(report.failures)
        for array in marker.arrays.values():
            report.expect(lambda array=array: _metadata(store, array.path, array.metadata))  # type: ignore[misc]
            for number in range(len(array.lengths)):
                report.expect(lambda array=array, number=number: array.check_chunk(number))  # type: ignore[misc]
        if len(report.failures) > before:
            report.spoilt.append(f"{store.url}/done/{task.name}")
    return markers


def _references(
    store: Store,
    task: Task,
    marker: Marker,
    markers: dict[Task, Marker],
    manifest_of: Callable[[str], json_record.Record],
    samples_of: Callable[[str], int],
) -> None:
    codec = None
    if task.kind == "bank":
        if task.id not in store.objects.names("banks"):
            raise DamageError(f"{store.url}/banks/{task.id}/manifest.json: missing, and {task.name} refers to it")
    else:
        manifest = manifest_of(task.id)
        codec = Codec.of(manifest)
        bank = Task("bank", manifest["identity"]["bank"], task.shard, task.view)
        if bank not in markers:
            raise DamageError(f"{store.url}/done/{bank.name}: missing or damaged, and {task.name} refers to it")
        if markers[bank].views_digest != marker.content["bank_views"]:
            raise DamageError(f"{marker.name}: its targets were made from another bank than {bank.name} names")
    marker.require(samples_of(task.shard), codec)


def _metadata(store: Store, path: str, metadata: json_record.Record) -> None:
    name = f"{store.url}/{path}/zarr.json"
    try:
        there = json.loads(store.objects.get(f"{path}/zarr.json"))
    except FileNotFoundError:
        raise DamageError(f"{name}: missing: an array's metadata is gone") from None
    except (ValueError, RecursionError) as error:
        raise DamageError(f"{name}: damaged: not JSON ({first_line(error)})") from None
    if there != metadata:
        raise DamageError(f"{name}: damaged: it differs from what its marker says")


def _unmarked(store: Store, report: VerifyReport, markers: dict[Task, Marker]) -> None:
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
                            f"{store.url}/done/{task.name}: missing or damaged, so a view does not count; the same "
                            "precompute command makes it anew"
                        )
                    elif extra := [a for a in attempts if a != markers[task].content["attempt"]]:
                        report.notices.append(f"{task.folder}: {len(extra)} attempt(s) left over, which nothing reads")


def _gaps(store: Store, report: VerifyReport, markers: Iterable[Task]) -> None:
    done = set(markers)
    for id in {task.id for task in done if task.kind == "target"}:
        shards = {task.shard for task in done if task.id == id}
        report.expect(lambda id=id, shards=shards: store.views("target", id, shards, done))  # type: ignore[misc]


def _replay(
    store: Store,
    report: VerifyReport,
    markers: dict[Task, Marker],
    url: str,
    known: Sequence[str],
    wanted: tuple[int, int] | None,
    look: Check | None,
) -> None:
    """Render views of a shard's samples again, `wanted` (how many, from where on) or all; `look` sees the pixels."""
    try:
        index = store.require(url, known)
    except UserError as error:
        report.failures.append(str(error))
        return
    if not len(index):
        report.notices.append(f"{url}: no samples in it")
        return
    count = len(index)
    step = max(1, -(-count // wanted[0])) if wanted else 1
    chosen = range(wanted[1] % step if wanted else 0, count, step)
    tasks = sorted(task for task in markers if task.kind == "bank" and task.shard == index.id)
    if not tasks:
        report.failures.append(f"{url}: no bank of this store has views of {index.id}")
    sizes = {id: bank_policy(store, id).size for id in {task.id for task in tasks}}
    for number in sorted({i // BLOCK for i in chosen}):
        block = index.block(number)
        some = [i for i in chosen if i in block]
        with _collecting(report):
            originals = read_samples(url, index, block)
            views = {task: read_views(markers[task], block.start, block.stop) for task in tasks}
            for task, pixels in _rendered(report, url, block, originals, some, views, sizes).items():
                if look:
                    look(url, index, task, pixels)


def _rendered(
    report: VerifyReport,
    url: str,
    block: range,
    originals: Sequence[Sample],
    some: Sequence[int],
    views: dict[Task, BankView],
    sizes: dict[str, int],
) -> dict[Task, dict[int, np.ndarray]]:
    """Bank's task -> index of a sample -> its view image, mixed. Each original is decoded once, and dropped."""
    wanted: dict[Task, set[int]] = {}
    for task, there in views.items():
        valid = [i for i in some if there.view(i - block.start).valid]
        partners = [mix.partner for i in valid if (mix := there.view(i - block.start).mix)]
        wanted[task] = {*valid, *partners}
    own: dict[Task, dict[int, np.ndarray]] = {task: {} for task in views}
    for i in sorted(set().union(*wanted.values())):
        sample = originals[i - block.start]
        with _collecting(report):
            image = decode(sample.image)
            for task, there in views.items():
                if i in wanted[task]:
                    where = f"{url}, bank {task.id}, view {task.view}"
                    own[task][i] = there.replay(i - block.start, sample, image, sizes[task.id], where)
                    report.views_rendered += 1
    images: dict[Task, dict[int, np.ndarray]] = {}
    for task, rendered in own.items():
        images[task] = {}
        for i in some:
            mix = views[task].view(i - block.start).mix
            if i in rendered and (mix is None or mix.partner in rendered):
                images[task][i] = mix_images(rendered[i], rendered[mix.partner], mix) if mix else rendered[i]
    return images
