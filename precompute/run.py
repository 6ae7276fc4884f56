"""Precompute as one call: from shards, a teacher and what is asked of it to complete targets in a store."""

from __future__ import annotations

import contextlib
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dask.system import CPU_COUNT

from precompute.bank_choice import settle
from precompute.engine.dask_client import workers
from precompute.engine.dask_runner import retry_io, run_in_process, run_on_cluster
from precompute.engine.shard import block_views, open_for_store
from precompute.engine.tasks import Failure, Outcome, Outcomes, SessionSettings, ShardTask, TargetOutput
from precompute.record_targets import record_targets
from precompute.results import PrecomputeResult
from storage.errors import UserError
from storage.objects.urls import is_remote
from storage.progress import NoProgress, Progress
from storage.shards.patterns import expand
from storage.shards.tar import counted_flaws, without_samples
from storage.store.card import card

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from distributed import Client

    from precompute.request import PrecomputeRequest
    from storage.shards.shard import Shard
    from storage.store.store import Store
    from storage.views.policy import Policy


@dataclass(frozen=True, slots=True)
class PrecomputePlan:
    """What a run has to do, once teacher, bank and targets are recorded: graph -> outputs over all shards."""

    store: Store
    request: PrecomputeRequest
    policy: Policy
    views: int
    by_graph: dict[str, tuple[TargetOutput, ...]]
    known: dict[str, list[str]]  # url -> ids of shards with its stem that the store knew
    opened: dict[str, Shard]  # url -> shard, of those that were opened so far
    client: Client | None  # of the workers; None where this process does it all

    @property
    def outputs(self) -> list[TargetOutput]:
        """The outputs of all graphs."""
        return [output for outputs in self.by_graph.values() for output in outputs]

    def task(self, graph: str, url: str) -> ShardTask:
        """What is to be done for one graph over one shard."""
        return ShardTask(
            store=self.store,
            url=url,
            policy=self.policy,
            teacher=self.request.teacher.name,
            graph=graph,
            outputs=self.by_graph[graph],
            views=self.views,
            on_decode_error=self.request.on_decode_error,
            known=tuple(self.known[url]),
            shard=self.opened.get(url),
        )

    def run(self, tasks: Iterator[ShardTask], count: int, progress: Progress) -> Outcomes:
        """Url and outcome of each task as they come: of the workers, or of this process."""
        provider, workers, timeout = self.request.provider, self.request.workers, self.request.worker_timeout
        if self.client is None:
            return run_in_process(tasks, count, provider, progress)
        threads = max(1, CPU_COUNT // workers) if workers else None
        return run_on_cluster(self.client, tasks, count, provider, threads, progress=progress, worker_timeout=timeout)


def plan_precompute(
    store: Store, request: PrecomputeRequest, progress: Progress, client: Client | None = None
) -> PrecomputePlan:
    """Record the teacher, the bank and the targets; nothing of a shard is made yet.

    Raises:
        UserError: as its parts do.
    """
    policy, views, known, opened = settle(store, request)

    def images() -> np.ndarray:
        """Images of the first shard that has any. A broken shard fails by itself, later."""
        failed: UserError | None = None
        for url in request.shards:
            try:
                opened[url] = open_for_store(store, url, known[url], request.on_decode_error, opened.get(url))
                if len(opened[url]):
                    return block_views(opened[url], policy)
            except UserError as error:
                failed = failed or error
        raise failed or without_samples(request.shards)

    by_graph = record_targets(store, request, policy, images, progress)
    return PrecomputePlan(
        store, request, policy, views=views, by_graph=by_graph, known=known, opened=opened, client=client
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
    with staffed(request, progress) as (request, client):
        plan = retry_io(lambda: plan_precompute(store, request, progress, client))
        return _precompute(plan, progress, began)


@contextlib.contextmanager
def staffed(request: PrecomputeRequest, progress: Progress) -> Iterator[tuple[PrecomputeRequest, Client | None]]:
    """A request in words that workers understand, and their client; None where this process does it all.

    Before anything else: a scheduler that cannot be reached is found out at once.
    """
    shards = expand(request.shards)
    if request.workers is None and request.dask is None:
        yield replace(request, shards=shards), None
        return
    absolute = [url if is_remote(url) else str(Path(url).absolute()) for url in shards]  # they live elsewhere
    with workers(request.workers, request.dask, progress.say, request.worker_timeout) as client:
        yield replace(request, shards=absolute), client


def _precompute(plan: PrecomputePlan, progress: Progress, began: float) -> PrecomputeResult:
    store, policy, say = plan.store, plan.policy, progress.say
    say(f"views: {policy.line}, size {policy.size}, seed {policy.seed}, {plan.views} a sample, bank {policy.bank}")
    outcomes: list[tuple[str, Outcome]] = []  # a shard comes once for each graph
    shards: dict[str, str] = {}  # id -> url
    failures: dict[str, Failure] = {}
    settings: SessionSettings = {}
    for url, outcome in _outcomes(plan, progress):
        if isinstance(outcome, Failure):
            failures[url] = outcome
            say(f"failed: {outcome.error.splitlines()[0]}")  # what to do is said once, in the end
            continue
        outcomes.append((url, outcome))
        plan.opened[url] = outcome.shard  # another graph's task has it open
        if len(outcome.shard) and shards.setdefault(outcome.shard.id, url) != url:
            text = f"{url} holds the same samples as {shards[outcome.shard.id]}; give each shard once"
            failures[url] = Failure(shard=url, error=text, kind="data")
        if outcome.settings and outcome.settings != settings:
            settings = outcome.settings
            say(f"on {settings['provider']}, {settings['precision']}, onnxruntime {settings['onnxruntime']}")
    invalid = list(dict.fromkeys(f"{url}: {key}" for url, outcome in outcomes for key in outcome.invalid))
    left_out = {url: outcome.left_out for url, outcome in outcomes if outcome.left_out}
    empty = list(dict.fromkeys(url for url, outcome in outcomes if not len(outcome.shard)))
    rendered = sum(outcome.rendered for _, outcome in outcomes)
    for line in invalid:
        say(f"cannot be decoded, so skipped in training: {line}")
    for url, flaws in left_out.items():
        say(f"{url}: {counted_flaws(flaws)}: skipped")
    for url in empty:
        say(f"{url}: no samples in it, so there is nothing to do")
    if not rendered and not failures:
        say("everything was already complete")
    retry_io(lambda: store.objects.put("README.md", card(store).encode()))
    seconds = time.monotonic() - began
    if rendered:
        say(f"{rendered:,} view images in {seconds:.1f} s ({rendered / seconds:.0f}/s)")
    return PrecomputeResult(
        store=store.url,
        bank=policy.bank,
        targets=[output.target for output in plan.outputs],
        shards=list(shards),
        views=plan.views,
        written=sum(outcome.written for _, outcome in outcomes),
        view_images=rendered,
        invalid=invalid,
        left_out=left_out,
        empty=empty,
        failures=list(failures.values()),
        session=settings,
        teacher={name: value for name, value in asdict(plan.request.teacher).items() if name != "classes"},
        seconds=round(seconds, 3),
    )


def _outcomes(plan: PrecomputePlan, progress: Progress) -> Outcomes:
    """Url and outcome of every task; one graph after another, so that a process holds one session."""
    shards = plan.request.shards
    for graph, outputs in plan.by_graph.items():
        progress.say(f"{', '.join(output.target for output in outputs)}: {len(shards)} shard(s)")
        progress.start(f"{plan.request.teacher.name} views", 0)
        tasks = (plan.task(graph, url) for url in shards)  # there may be many
        yield from plan.run(tasks, len(shards), progress)
