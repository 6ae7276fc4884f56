"""Precompute as one call: from shards, a teacher and wishes to complete targets in a store."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from precompute import targets
from precompute.engine import ShardTask, known_index, missing, one_view, open_session, run_task
from precompute.teachers import Teacher
from storage import banks
from storage.card import card
from storage.errors import UserError
from storage.policies import Policy
from storage.progress import Progress
from storage.store import Store


@dataclass(frozen=True)
class Wanted:
    """What a run is asked for."""

    shards: Sequence[str]
    teacher: Teacher
    wishes: Sequence[targets.Wish]
    policy: Policy
    given: frozenset[str]  # which of line, size and seed were said
    views: int | None
    new_bank: bool = False
    provider: str = "auto"
    bad_images: Literal["fail", "skip"] = "fail"


def precompute(store: Store, wanted: Wanted, progress: Progress) -> dict[str, Any]:
    """Make everything that is wanted and missing; what was done, as plain data.

    Raises:
        UserError: as its parts do. What was complete stays.
    """
    began = time.monotonic()
    teacher = wanted.teacher
    progress.say(f"store {store.url}")
    manifest = targets.record_teacher(store, teacher)
    progress.say(f"indexing {len(wanted.shards)} shard(s)")
    shards: dict[str, tuple[str, int]] = {}  # url -> id, samples; whole indexes of many shards are large
    for url in wanted.shards:
        index = known_index(store, url)
        shards[url] = (index.id, len(index))
    ids = _refuse_twice(shards)
    policy = targets.choose_policy(store, wanted.policy, set(wanted.given), ids, wanted.new_bank)
    views = _views(store, policy, wanted.views, ids)
    progress.say(f"bank {policy.bank}: {policy.line}, size {policy.size}, seed {policy.seed}, {views} view(s)")
    store.add_bank(policy.bank, policy.identity, banks.describe(policy))

    first = wanted.shards[0]
    by_graph = targets.record_targets(
        store, teacher, manifest, wanted.wishes or targets.defaults(manifest, policy), policy,
        lambda: one_view(first, known_index(store, first), policy), wanted.provider, progress.say,
    )  # fmt: skip
    invalid: list[str] = []
    written = rendered = 0
    settings: dict[str, Any] = {}
    for graph, outputs in by_graph.items():
        tasks = [
            ShardTask(store, url, policy.bank, teacher.name, graph, outputs, views, wanted.bad_images)
            for url in wanted.shards
        ]
        todo = {task.url: len(missing(task, shards[task.url][0])) * shards[task.url][1] for task in tasks}
        names = ", ".join(output.target for output in outputs)
        if not any(todo.values()):
            progress.say(f"complete already: {names}")
            continue
        session = open_session(store.graph(teacher.name, graph), wanted.provider)
        settings = session.settings
        progress.say(f"{names}\n  on {settings['provider']}, {settings['precision']}, {len(tasks)} shard(s)")
        progress.start(f"{teacher.name} views", sum(todo.values()))
        for task in tasks:
            if todo[task.url]:
                outcome = run_task(task, session, progress.advance)
                invalid += [f"{task.url}: {key}" for key in outcome.invalid]
                written += outcome.written
        rendered += sum(todo.values())
    for line in invalid:
        progress.say(f"left out, marked invalid: {line}")
    store.objects.put("README.md", card(store).encode())
    seconds = time.monotonic() - began
    if rendered:
        progress.say(f"{rendered:,} view images in {seconds:.1f} s ({rendered / seconds:.0f}/s)")
    return {
        "store": store.url,
        "bank": policy.bank,
        "targets": [output.target for outputs in by_graph.values() for output in outputs],
        "shards": ids,
        "views": views,
        "written": written,
        "view_images": rendered,
        "invalid": invalid,
        "session": settings,
        "teacher": {key: value for key, value in asdict(teacher).items() if key != "classes"},
        "seconds": round(seconds, 3),
    }


def _refuse_twice(shards: dict[str, tuple[str, int]]) -> list[str]:
    """The shards' ids, all different."""
    seen: dict[str, str] = {}
    for url, (id, _) in shards.items():
        if id in seen:
            raise UserError(f"{url} holds the same samples as {seen[id]}; give each shard once")
        seen[id] = url
    return list(seen)


def _views(store: Store, policy: Policy, wanted: int | None, shards: Sequence[str]) -> int:
    """How many views: as said; else as many as the bank has over these shards; else four, or one without chance."""
    if not policy.random:
        if wanted not in (None, 1):
            raise UserError(f"--view-count {wanted}: {policy.line} leaves nothing to chance, so it has one view")
        return 1
    if wanted is not None:
        return wanted
    done = store.done()
    there = [t.view for t in done if t.kind == "bank" and t.id == policy.bank and t.shard in set(shards)]
    return max(there) + 1 if there else 4
