"""Precompute as one call: from shards, a teacher and what is asked of it to complete targets in a store."""

from __future__ import annotations

import contextlib
import functools
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dask.system import CPU_COUNT

from precompute import record_targets
from precompute.bank_choice import candidates, settle
from precompute.engine.dask_client import workers
from precompute.engine.dask_runner import retry_io, run_in_process, run_on_cluster
from precompute.engine.shard import block_views, open_for_store
from precompute.engine.tasks import Failure, Outcome, SessionSettings, ShardTask, TargetOutput
from precompute.results import PrecomputeResult
from precompute.teachers.teacher import load_teacher
from storage.errors import UserError
from storage.objects.urls import is_remote
from storage.progress import NoProgress, Progress
from storage.shards.patterns import expand
from storage.shards.tar import counted_flaws, without_samples
from storage.store import banks
from storage.store.card import card

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from distributed import Client

    from precompute.request import PrecomputeRequest
    from storage.shards.shard import Shard
    from storage.store.store import Store
    from storage.views.policy import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecomputePlan:
    """What a run has to do, once teacher, bank and targets are recorded: graph -> outputs over all shards."""

    store: Store
    wanted: PrecomputeRequest
    policy: Policy
    views: int
    by_graph: dict[str, tuple[TargetOutput, ...]]
    known: dict[str, list[str]]  # url -> ids of shards with its stem that the store knew
    opened: dict[str, Shard]  # url -> shard, of those that were opened so far

    def tasks(self, graph: str, shards: Sequence[str] | None = None) -> Iterator[ShardTask]:
        """The tasks of one graph, one after another: there may be many."""
        wanted = self.wanted
        for url in shards or wanted.shards:
            yield ShardTask(
                store=self.store,
                url=url,
                policy=self.policy,
                teacher=wanted.teacher.name,
                graph=graph,
                outputs=self.by_graph[graph],
                views=self.views,
                on_decode_error=wanted.on_decode_error,
                known=tuple(self.known[url]),
                shard=self.opened.get(url),
            )


def plan_precompute(store: Store, wanted: PrecomputeRequest, progress: Progress) -> PrecomputePlan:
    """Record the teacher, the bank and the targets; nothing of a shard is made yet.

    Raises:
        UserError: as its parts do.
    """
    known = candidates(store, wanted.shards)
    policy, views, opened = settle(store, wanted, known)
    network = functools.cache(functools.partial(load_teacher, wanted.teacher))
    manifest = record_targets.record_teacher(store, wanted.teacher, network)
    store.add(banks.bank_manifest(policy))

    def images() -> Any:
        """Images of the first shard that has any. A broken shard fails by itself, later."""
        failed: UserError | None = None
        for url in wanted.shards:
            try:
                opened[url] = open_for_store(store, url, known[url], wanted.on_decode_error, opened.get(url))
                if len(opened[url]):
                    return block_views(opened[url], policy)
            except UserError as error:
                failed = failed or error
        raise failed or without_samples(wanted.shards)

    from precompute.taps import TAPS

    specs = [
        replace(spec, grid=wanted.grid) if TAPS[spec.tap].gridded and spec.grid is None else spec
        for spec in wanted.targets or record_targets.defaults(manifest)
    ]
    elsewhere = wanted.workers is not None or wanted.dask is not None  # this machine may have no accelerator
    by_graph = record_targets.record_targets(
        store,
        wanted.teacher,
        manifest,
        specs,
        policy,
        network=network,
        images=images,
        provider="auto" if elsewhere else wanted.provider,
        say=progress.say,
    )
    if wanted.store_views:
        first_graph = next(iter(by_graph))
        by_graph[first_graph] = (*by_graph[first_graph], record_targets.record_pixels(store, policy))
    return PrecomputePlan(
        store=store, wanted=wanted, policy=policy, views=views, by_graph=by_graph, known=known, opened=opened
    )


def precompute(store: Store, request: PrecomputeRequest, progress: Progress | None = None) -> PrecomputeResult:
    """Compute all targets that are wanted and missing; what was done, as plain data.

    Call it again to resume. `targets` lists the ids of the targets. A shard that fails is listed under `failures`; the
    others are finished.

    Args:
        store: where the targets are kept, from `Store.create`.
        request: shards, teacher, targets and views.
        progress: told how far the run is; None for silence.

    Raises:
        UserError: the request cannot be met; no shard was begun, and what was complete stays.
    """
    progress = progress or NoProgress()
    began = time.monotonic()
    progress.say(f"store {store.url}")
    with staffed(request, progress) as (settled, client):
        job = retry_io(lambda: plan_precompute(store, settled, progress))
        return _precompute(job, client, progress, began)


@contextlib.contextmanager
def staffed(wanted: PrecomputeRequest, progress: Progress) -> Iterator[tuple[PrecomputeRequest, Client | None]]:
    """What is wanted, in words that workers understand, and their client; None where this process does it all.

    Before anything else: a scheduler that cannot be reached is found out at once.
    """
    shards = expand(wanted.shards)
    if wanted.workers is None and wanted.dask is None:
        yield replace(wanted, shards=shards), None
        return
    absolute = [url if is_remote(url) else str(Path(url).absolute()) for url in shards]  # they live elsewhere
    with workers(wanted.workers, wanted.dask, progress.say, wanted.worker_timeout) as client:
        yield replace(wanted, shards=absolute), client


def _precompute(job: PrecomputePlan, client: Client | None, progress: Progress, began: float) -> PrecomputeResult:
    store, wanted, policy = job.store, job.wanted, job.policy
    progress.say(
        f"views: {policy.line}, size {policy.size}, seed {policy.seed}, {job.views} a sample, bank {policy.bank}"
    )
    shards: dict[str, str] = {}  # id -> url
    failures: dict[str, Failure] = {}
    invalid: dict[str, None] = {}  # a shard comes once for each graph
    left_out: dict[str, tuple[str, ...]] = {}
    empty: dict[str, None] = {}
    written = rendered = 0
    settings: SessionSettings = {}
    for url, outcome in _outcomes(job, client, progress):
        if isinstance(outcome, Failure):
            failures[url] = outcome
            progress.say(f"failed: {outcome.error.splitlines()[0]}")  # what to do is said once, in the end
            continue
        if outcome.left_out:
            left_out[url] = outcome.left_out
        job.opened[url] = outcome.shard  # another graph's task has it open
        if not len(outcome.shard):
            empty[url] = None
        elif shards.setdefault(outcome.shard.id, url) != url:
            text = f"{url} holds the same samples as {shards[outcome.shard.id]}; give each shard once"
            failures[url] = Failure(shard=url, error=text, kind="data")
        invalid |= dict.fromkeys(f"{url}: {key}" for key in outcome.invalid)
        written, rendered = written + outcome.written, rendered + outcome.rendered
        if outcome.settings and outcome.settings != settings:
            settings = outcome.settings
            progress.say(f"on {settings['provider']}, {settings['precision']}, onnxruntime {settings['onnxruntime']}")
    for line in invalid:
        progress.say(f"cannot be decoded, so skipped in training: {line}")
    for url, flaws in left_out.items():
        progress.say(f"{url}: {counted_flaws(flaws)}: skipped")
    for url in empty:
        progress.say(f"{url}: no samples in it, so there is nothing to do")
    if not rendered and not failures:
        progress.say("everything was already complete")
    retry_io(lambda: store.objects.put("README.md", card(store).encode()))
    seconds = time.monotonic() - began
    if rendered:
        progress.say(f"{rendered:,} view images in {seconds:.1f} s ({rendered / seconds:.0f}/s)")
    return PrecomputeResult(
        store=store.url,
        bank=policy.bank,
        targets=[output.target for outputs in job.by_graph.values() for output in outputs],
        shards=list(shards),
        views=job.views,
        written=written,
        view_images=rendered,
        invalid=list(invalid),
        left_out=left_out,
        empty=list(empty),
        failures=list(failures.values()),
        session=settings,
        teacher={name: value for name, value in asdict(wanted.teacher).items() if name != "classes"},
        seconds=round(seconds, 3),
    )


def _outcomes(
    job: PrecomputePlan, client: Client | None, progress: Progress
) -> Iterator[tuple[str, Outcome | Failure]]:
    """Url and outcome of every task; one graph after another, so that a process holds one session."""
    wanted, count = job.wanted, len(job.wanted.shards)
    for graph, outputs in job.by_graph.items():
        progress.say(f"{', '.join(output.target for output in outputs)}: {count} shard(s)")
        progress.start(f"{wanted.teacher.name} views", 0)
        if client is None:
            yield from run_in_process(job.tasks(graph), count, wanted.provider, progress)
        else:
            yield from run_elsewhere(client, job.tasks(graph), count, wanted, progress)


def run_elsewhere(
    client: Client, tasks: Iterator[ShardTask], count: int, wanted: PrecomputeRequest, progress: Progress
) -> Iterator[tuple[str, Outcome | Failure]]:
    """Url and outcome of each task on a client's workers, as they come."""
    threads = max(1, CPU_COUNT // wanted.workers) if wanted.workers else None
    return run_on_cluster(
        client, tasks, count, wanted.provider, threads, progress=progress, worker_timeout=wanted.worker_timeout
    )
