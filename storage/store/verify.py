"""Verify: does every object of a store still hold what was written, and do the shards still give the same pixels?

Structure, checksums and references need the store alone; with shards, views are rendered again and their
signatures compared. Everything wrong is listed, by name; nothing is changed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, get_args

import numpy as np

from storage.constants import BLOCK
from storage.errors import DamageError, UserError, first_line
from storage.objects import json_record
from storage.shards.shard import Shard
from storage.store.arrays import StoredArray, read_written
from storage.store.banks import BankView, bank_policy, read_views
from storage.store.manifests import BankManifest, Manifest, TargetManifest, TeacherManifest, require_id
from storage.store.markers import RECOMPUTE, Kind, Marker, Task
from storage.views.mixing import mix_images
from storage.views.render import decode

if TYPE_CHECKING:
    from storage.store.codecs import Codec
    from storage.store.store import Store

# Given a shard, a bank's task, and view images by the samples' indices.
Check = Callable[[Shard, Task, dict[int, np.ndarray]], None]


@dataclass(slots=True, kw_only=True)
class VerifyReport:
    """What was looked at, what was wrong, and what is only worth knowing."""

    objects: int = 0
    views_rendered: int = 0
    targets_compared: int = 0  # (target, view, sample)
    compared_with: dict[str, str] = field(default_factory=dict)  # teacher -> what its targets were compared with
    failures: list[str] = field(default_factory=list)
    spoilt: list[str] = field(default_factory=list)  # markers of what is damaged: without them it is recomputed
    notices: list[str] = field(default_factory=list)

    @contextmanager
    def checking(self) -> Iterator[None]:
        """Count a check, and a failure where it raises what a user can understand."""
        self.objects += 1
        try:
            yield
        except UserError as error:
            self.failures.append(str(error))
        except OSError as error:
            self.failures.append(f"{error.filename or 'input or output'}: cannot be read: {first_line(error)}")


def verify(
    store: Store,
    shards: Sequence[str] = (),
    *,
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
        say: called with progress lines.
        look: given the view images that were rendered, uint8 [S, S, 3] by the sample's index, of each bank's task.
        report: where to add what is found.
    """
    report = VerifyReport() if report is None else report
    checks = _Verification(store, report, say)
    checks.manifests()
    checks.indexes()
    checks.check_markers()
    checks.unmarked()
    checks.gaps()
    chosen = shards[:: max(1, -(-len(shards) // samples))] if samples else shards
    for number, url in enumerate(chosen):
        say(f"rendering views of {url} again")
        checks.replay(url, number, -(-samples // len(chosen)), look)
    return report


class _Verification:
    """The checks of one store, in the order in which `verify` calls them; `markers` are those that are whole."""

    def __init__(self, store: Store, report: VerifyReport, say: Callable[[str], None]) -> None:
        self.store, self.report, self.say = store, report, say
        self.names, self.url = store.objects.names, store.url
        self.known = store.shard_ids()
        self.samples: dict[str, int] = {}  # shard -> how many samples it has, by its index if that is whole
        self.markers: dict[Task, Marker] = {}
        self._target = functools.cache(store.target)  # read once, not for every marker

    def manifests(self) -> None:
        for model in (BankManifest, TeacherManifest, TargetManifest):
            for id in self.names(f"{model.KIND}s"):
                if self.names(f"{model.KIND}s/{id}"):
                    with self.report.checking():
                        self._manifest(model, id)
                else:
                    self.report.notices.append(f"{model.KIND}s/{id}: an empty folder")

    def _manifest(self, model: type[Manifest], id: str) -> None:
        manifest = self.store.manifest(model, id)
        if isinstance(manifest, BankManifest):
            bank_policy(self.store, id)
        elif isinstance(manifest, TargetManifest):
            require_id(f"{self.url}/targets/{id}/manifest.json", manifest)
            if manifest.graph is not None:  # no teacher made view images
                self.store.graph(manifest.teacher, manifest.graph)
                self.store.teacher_of(manifest)

    def indexes(self) -> None:
        for shard in self.known:
            with self.report.checking():
                index = self.store.index(shard)
                if json_record.digest_of([list(index.keys), list(index.digests)])[:8] != shard.rpartition("-")[2]:
                    name = f"{self.url}/shards/{shard}.json"
                    raise DamageError(f"{name}: damaged: its keys and images are not those of its id")
                self.samples[shard] = len(index)

    def check_markers(self) -> None:
        for name in self.names("done"):
            task = Task.named(name)
            if task is None:
                self.report.failures.append(f"{self.url}/done/{name}: does not belong here")
                continue
            if task.shard not in self.known:
                self.report.failures.append(f"{self.url}/shards/{task.shard}.json: missing, and {name} refers to it")
            with self.report.checking():
                self.markers[task] = self.store.marker(task)
            if task not in self.markers:
                self.report.spoilt.append(f"{self.url}/done/{name}")
        for i, (task, marker) in enumerate(sorted(self.markers.items()), 1):
            self.say(f"checksums {i}/{len(self.markers)}: {task.id} {task.shard} view {task.view}")
            with self.report.checking():
                codec = self._codec(marker)
                if task.shard in self.samples:
                    marker.require(self.samples[task.shard], codec)
            before = len(self.report.failures)
            for array in marker.arrays.values():
                with self.report.checking():
                    self._metadata(array)
                for number in range(array.metadata.chunks):
                    with self.report.checking():
                        array.check_chunk(number)
            if len(self.report.failures) > before:
                self.report.spoilt.append(marker.name)

    def _codec(self, marker: Marker) -> Codec | None:
        """What a marker's arrays are made by: the codec of a target, whose bank is as it names it; None of a bank."""
        task = marker.task
        if task.kind == "bank":
            if task.id not in self.names("banks"):
                raise DamageError(f"{self.url}/banks/{task.id}/manifest.json: missing, and {task.name} refers to it")
            return None
        manifest = self._target(task.id)
        bank = replace(task, kind="bank", id=manifest.identity.bank)
        if bank not in self.markers:
            raise DamageError(f"{self.url}/done/{bank.name}: missing or damaged, and {task.name} refers to it")
        if self.markers[bank].bank.views_digest != marker.target.bank_views:
            raise DamageError(f"{marker.name}: its targets were made from another bank than {bank.name} names")
        return manifest.codec

    def _metadata(self, array: StoredArray) -> None:
        key = f"{array.path}/zarr.json"
        try:
            content = json.loads(read_written(self.store.objects, key, "an array's metadata is gone"))
        except (ValueError, RecursionError) as error:
            raise DamageError(f"{self.url}/{key}: damaged: not JSON ({first_line(error)})") from None
        if content != array.metadata.plain():
            raise DamageError(f"{self.url}/{key}: damaged: it differs from what its marker says")

    def unmarked(self) -> None:
        """Attempts without a marker: a run that was killed, or a marker that is gone. Superseded ones are garbage."""
        for kind in get_args(Kind):
            for id in self.names(f"{kind}s"):
                for shard in self.names(f"{kind}s/{id}"):
                    if shard != "manifest.json":
                        for view in self.names(f"{kind}s/{id}/{shard}"):
                            self._attempts(kind, id, shard, view)

    def _attempts(self, kind: Kind, id: str, shard: str, view: str) -> None:
        if not view.isdigit():
            self.report.notices.append(f"{kind}s/{id}/{shard}/{view}: does not belong here")
            return
        task = Task(kind, id, shard, int(view))
        attempts = self.names(task.folder)
        if task not in self.markers and attempts:
            lost = f"{self.url}/done/{task.name}: missing or damaged, so a view does not count"
            self.report.failures.append(f"{lost}\n  {RECOMPUTE}")
        elif extra := [name for name in attempts if name != self.markers[task].record.attempt]:
            self.report.notices.append(f"{task.folder}: {len(extra)} attempt(s) left over, which nothing reads")

    def gaps(self) -> None:
        """Shards with fewer views of a target than others."""
        done = set(self.markers)
        for id in {task.id for task in done if task.kind == "target"}:
            with self.report.checking():
                self.store.views("target", id, {task.shard for task in done if task.id == id}, done)

    def replay(self, url: str, number: int, most: int, look: Check | None) -> None:
        """Render views of `most` of a shard's samples again, 0 for all, from one that depends on the shard's number."""
        try:
            shard = self.store.require(url, self.known)
        except UserError as error:
            self.report.failures.append(str(error))
            return
        if not len(shard):
            self.report.notices.append(f"{url}: no samples in it")
            return
        step = -(-len(shard) // most) if most else 1
        chosen = range(number % step, len(shard), step)
        tasks = sorted(task for task in self.markers if task.kind == "bank" and task.shard == shard.id)
        if not tasks:
            self.report.failures.append(f"{url}: no bank of this store has views of {shard.id}")
        sizes = {task: bank_policy(self.store, task.id).size for task in tasks}
        for block in map(shard.index.block, sorted({i // BLOCK for i in chosen})):
            with self.report.checking():
                images = self._images(shard, block, [i for i in chosen if i in block], sizes)
                if look:
                    for task, pixels in images.items():
                        look(shard, task, pixels)

    def _images(
        self, shard: Shard, block: range, indices: list[int], sizes: dict[Task, int]
    ) -> dict[Task, dict[int, np.ndarray]]:
        """Bank's task -> index of a sample -> its view image, mixed. Each original is decoded once, and dropped."""
        originals = dict(zip(block, shard.read(block), strict=True))
        views = {task: read_views(self.markers[task], block.start, block.stop) for task in sizes}
        needed: dict[Task, set[int]] = {}
        for task, bank_view in views.items():
            valid = [i for i in indices if bank_view.view(i).valid]
            needed[task] = {*valid, *(mix.partner for i in valid if (mix := bank_view.view(i).mix))}
        rendered: dict[Task, dict[int, np.ndarray]] = {task: {} for task in views}
        for i in sorted(set().union(*needed.values())):
            with self.report.checking():
                image = decode(originals[i].image)
                for task, bank_view in views.items():
                    if i in needed[task]:
                        where = f"{shard.url}, bank {task.id}, view {task.view}"
                        rendered[task][i] = bank_view.replay(i, originals[i], image, sizes[task], where)
                        self.report.views_rendered += 1
        return {task: _mixed(rendered[task], indices, bank_view) for task, bank_view in views.items()}


def _mixed(rendered: dict[int, np.ndarray], indices: list[int], bank_view: BankView) -> dict[int, np.ndarray]:
    """Index of a sample -> its view image, mixed; without those whose own or partner's image could not be rendered."""
    mixes = {i: bank_view.view(i).mix for i in indices if i in rendered}
    return {
        i: mix_images(rendered[i], rendered[mix.partner], mix) if mix else rendered[i]
        for i, mix in mixes.items()
        if mix is None or mix.partner in rendered
    }
