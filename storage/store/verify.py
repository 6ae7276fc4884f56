"""Verify: does every object of a store still hold what was written, and do the shards still give the same pixels?

Structure, checksums and references need the store alone; with shards, views are rendered again and their
signatures compared. Everything wrong is listed, by name; nothing is changed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from storage.constants import BLOCK
from storage.errors import DamageError, UserError, first_line
from storage.objects import json_record
from storage.shards.shard import Shard
from storage.store.banks import BankView, bank_policy, read_views
from storage.store.manifests import BankManifest, Manifest, TargetManifest, TeacherManifest, require_id
from storage.store.markers import RECOMPUTE, Marker, Task
from storage.views.mixing import mix_images
from storage.views.render import decode

if TYPE_CHECKING:
    from storage.shards.tar import Sample
    from storage.store.arrays import StoredArray
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
    _manifests(store, report)
    known = store.shard_ids()
    sizes: dict[str, int] = {}  # shard -> how many samples it has
    for shard in known:
        with report.checking():
            sizes[shard] = _samples(store, shard)
    markers = _markers(store, report, known, sizes, say)
    _unmarked(store, report, markers)
    _gaps(store, report, markers)
    chosen = shards[:: max(1, -(-len(shards) // samples))] if samples else shards
    for number, url in enumerate(chosen):
        say(f"rendering views of {url} again")
        wanted = (-(-samples // len(chosen)), number) if samples else None
        _replay(store, report, markers, url=url, known=known, wanted=wanted, look=look)
    return report


def _manifests(store: Store, report: VerifyReport) -> None:
    for model in (BankManifest, TeacherManifest, TargetManifest):
        for id in store.objects.names(f"{model.KIND}s"):
            if store.objects.names(f"{model.KIND}s/{id}"):
                with report.checking():
                    _manifest(store, model, id)
            else:
                report.notices.append(f"{model.KIND}s/{id}: an empty folder")


def _manifest(store: Store, model: type[Manifest], id: str) -> None:
    manifest = store.manifest(model, id)
    if isinstance(manifest, BankManifest):
        bank_policy(store, id)
    elif isinstance(manifest, TargetManifest):
        require_id(f"{store.url}/targets/{id}/manifest.json", manifest)
        if manifest.graph is not None:  # no teacher made view images
            store.graph(manifest.teacher, manifest.graph)
            store.teacher_of(manifest)


def _samples(store: Store, shard: str) -> int:
    """How many samples a shard has, by its index, which is checked."""
    index = store.index(shard)
    if json_record.digest_of([list(index.keys), list(index.digests)])[:8] != shard.rpartition("-")[2]:
        raise DamageError(f"{store.url}/shards/{shard}.json: damaged: its keys and images are not those of its id")
    return len(index)


def _markers(
    store: Store, report: VerifyReport, known: Sequence[str], samples: Mapping[str, int], say: Callable[[str], None]
) -> dict[Task, Marker]:
    """The markers that are whole: of the `known` shards, and with the `samples` of those whose index is whole."""
    markers: dict[Task, Marker] = {}
    for name in store.objects.names("done"):
        task = Task.named(name)
        if task is None:
            report.failures.append(f"{store.url}/done/{name}: does not belong here")
            continue
        if task.shard not in known:
            report.failures.append(f"{store.url}/shards/{task.shard}.json: missing, and {name} refers to it")
        with report.checking():
            markers[task] = store.marker(task)
        if task not in markers:
            report.spoilt.append(f"{store.url}/done/{name}")
    manifest = functools.cache(store.target)  # read once, not for every marker
    for i, (task, marker) in enumerate(sorted(markers.items()), 1):
        say(f"checksums {i}/{len(markers)}: {task.id} {task.shard} view {task.view}")
        with report.checking():
            codec = _codec(store, marker, markers, manifest)
            if task.shard in samples:
                marker.require(samples[task.shard], codec)
        before = len(report.failures)
        for array in marker.arrays.values():
            with report.checking():
                _metadata(store, array)
            for number in range(array.metadata.chunks):
                with report.checking():
                    array.check_chunk(number)
        if len(report.failures) > before:
            report.spoilt.append(f"{store.url}/done/{task.name}")
    return markers


def _codec(
    store: Store, marker: Marker, markers: dict[Task, Marker], manifest_of: Callable[[str], TargetManifest]
) -> Codec | None:
    """What a marker's arrays are made by: the codec of a target, whose bank is as it names it; nothing of a bank."""
    task = marker.task
    if task.kind == "bank":
        if task.id not in store.objects.names("banks"):
            raise DamageError(f"{store.url}/banks/{task.id}/manifest.json: missing, and {task.name} refers to it")
        return None
    manifest = manifest_of(task.id)
    bank = replace(task, kind="bank", id=manifest.identity.bank)
    if bank not in markers:
        raise DamageError(f"{store.url}/done/{bank.name}: missing or damaged, and {task.name} refers to it")
    if markers[bank].bank.views_digest != marker.target.bank_views:
        raise DamageError(f"{marker.name}: its targets were made from another bank than {bank.name} names")
    return manifest.codec


def _metadata(store: Store, array: StoredArray) -> None:
    name = f"{store.url}/{array.path}/zarr.json"
    try:
        content = json.loads(store.objects.get(f"{array.path}/zarr.json"))
    except FileNotFoundError:
        raise DamageError(f"{name}: missing: an array's metadata is gone") from None
    except (ValueError, RecursionError) as error:
        raise DamageError(f"{name}: damaged: not JSON ({first_line(error)})") from None
    if content != array.metadata.plain():
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
                            f"{store.url}/done/{task.name}: missing or damaged, so a view does not count\n  {RECOMPUTE}"
                        )
                    elif extra := [name for name in attempts if name != markers[task].record.attempt]:
                        report.notices.append(f"{task.folder}: {len(extra)} attempt(s) left over, which nothing reads")


def _gaps(store: Store, report: VerifyReport, markers: Iterable[Task]) -> None:
    done = set(markers)
    for id in {task.id for task in done if task.kind == "target"}:
        with report.checking():
            store.views("target", id, {task.shard for task in done if task.id == id}, done)


def _replay(
    store: Store,
    report: VerifyReport,
    markers: dict[Task, Marker],
    *,
    url: str,
    known: Sequence[str],
    wanted: tuple[int, int] | None,
    look: Check | None,
) -> None:
    """Render views of a shard's samples again, `wanted` (how many, from where on) or all; `look` sees the pixels."""
    try:
        shard = store.require(url, known)
    except UserError as error:
        report.failures.append(str(error))
        return
    if not len(shard):
        report.notices.append(f"{url}: no samples in it")
        return
    count = len(shard)
    step = max(1, -(-count // wanted[0])) if wanted else 1
    chosen = range(wanted[1] % step if wanted else 0, count, step)
    tasks = sorted(task for task in markers if task.kind == "bank" and task.shard == shard.id)
    if not tasks:
        report.failures.append(f"{url}: no bank of this store has views of {shard.id}")
    sizes = {id: bank_policy(store, id).size for id in {task.id for task in tasks}}
    for number in sorted({i // BLOCK for i in chosen}):
        block = shard.index.block(number)
        indices = [i for i in chosen if i in block]
        with report.checking():
            originals = dict(zip(block, shard.read(block), strict=True))
            views = {task: read_views(markers[task], block.start, block.stop) for task in tasks}
            rendered = _rendered(report, originals, indices, views, url=url, sizes=sizes)
            for task, pixels in rendered.items():
                if look:
                    look(shard, task, pixels)


def _rendered(
    report: VerifyReport,
    originals: Mapping[int, Sample],
    indices: Sequence[int],
    views: dict[Task, BankView],
    *,
    url: str,
    sizes: dict[str, int],
) -> dict[Task, dict[int, np.ndarray]]:
    """Bank's task -> index of a sample -> its view image, mixed. Each original is decoded once, and dropped."""
    wanted: dict[Task, set[int]] = {}
    for task, bank_view in views.items():
        valid = [i for i in indices if bank_view.view(i).valid]
        partners = [mix.partner for i in valid if (mix := bank_view.view(i).mix)]
        wanted[task] = {*valid, *partners}
    own: dict[Task, dict[int, np.ndarray]] = {task: {} for task in views}
    for i in sorted(set().union(*wanted.values())):
        with report.checking():
            image = decode(originals[i].image)
            for task, bank_view in views.items():
                if i in wanted[task]:
                    where = f"{url}, bank {task.id}, view {task.view}"
                    own[task][i] = bank_view.replay(i, originals[i], image, sizes[task.id], where)
                    report.views_rendered += 1
    images: dict[Task, dict[int, np.ndarray]] = {}
    for task, rendered in own.items():
        images[task] = {}
        for i in indices:
            mix = views[task].view(i).mix
            if i in rendered and (mix is None or mix.partner in rendered):
                images[task][i] = mix_images(rendered[i], rendered[mix.partner], mix) if mix else rendered[i]
    return images
