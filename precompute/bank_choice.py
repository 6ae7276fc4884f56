"""Which bank a run writes to: the one that the request asks for, or the store's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from storage.errors import IdentityError, UserError, setting
from storage.shards.tar import stem_of
from storage.store.banks import policy_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from precompute.request import PrecomputeRequest
    from storage.shards.shard import Shard
    from storage.store.store import Store
    from storage.views.policy import Policy


_FIELDS = {"line": "view policy", "size": "view size", "seed": "seed"}  # of a policy -> what messages call it


def choose_policy(
    store: Store,
    requested: Policy,
    *,
    fields: Collection[str],
    candidates: Collection[str],
    recognize: Callable[[], set[str]],
    new_bank: bool,
) -> Policy:
    """The policy of this run: what was not said comes from the bank that the shards have already.

    Args:
        store: with its banks.
        requested: policy, size and seed, said or by default.
        fields: which of `line`, `size` and `seed` were said.
        candidates: ids of known shards that these may be, by their names.
        recognize: gives those that they are; it reads every file, so it is called only where it matters.
        new_bank: another bank beside the one that is there is wanted.

    Raises:
        IdentityError: the shards have views of another policy, size or seed, and no new bank was asked for.
    """
    done = [task for task in store.done() if task.kind == "bank" and task.shard in candidates]
    if new_bank or not done or any(task.id == requested.bank for task in done):
        return requested
    shards = recognize()
    policies = [policy_of(store.bank(id)) for id in sorted({task.id for task in done if task.shard in shards})]
    if not policies:
        return requested
    fitting = [policy for policy in policies if not _differing(policy, requested, fields)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise UserError(
            f"{store.url}: these shards have views in {len(fitting)} banks: {', '.join(p.bank for p in fitting)}",
            hint=f"Choose one by {setting('view_policy', 'P')}, {setting('view_size', 'N')} and {setting('seed', 'N')}",
        )
    policy, name = policies[0], _differing(policies[0], requested, fields)[0]
    hint = (
        "All targets of a training run need the same views, those of one bank. Leave the setting out to use the views "
        f"that exist, or make others beside them: {setting('new_bank', True)}"
    )
    where, words = f"{store.url}: bank {policy.bank}", ("the store has", "asked for")
    raise IdentityError(where, _FIELDS[name], getattr(policy, name), getattr(requested, name), hint, words)


def _differing(policy: Policy, requested: Policy, fields: Collection[str]) -> list[str]:
    """Which of the fields that were said differ; a policy without chance has no seed."""
    names = [name for name in _FIELDS if name in fields and (name != "seed" or policy.random)]
    return [name for name in names if getattr(policy, name) != getattr(requested, name)]


def settle(store: Store, request: PrecomputeRequest) -> tuple[Policy, int, dict[str, list[str]], dict[str, Shard]]:
    """The policy and the number of views of a run.

    Also url -> ids of shards that it may be, and url -> shard of those that had to be opened.

    Raises:
        UserError: as `choose_policy` does, or several views of a policy that leaves nothing to chance.
    """
    known = candidates(store, request.shards)
    opened: dict[str, Shard] = {}

    def recognize() -> set[str]:
        for url, ids in known.items():
            if (shard := store.recognize(url, ids)) is not None:
                opened[url] = shard
        return {shard.id for shard in opened.values()}

    said, ids = request.policy_fields, {id for ids in known.values() for id in ids}
    policy = choose_policy(
        store, request.policy, fields=said, candidates=ids, recognize=recognize, new_bank=request.new_bank
    )
    return policy, _choose_views(store, policy, request.num_views), known, opened


def candidates(store: Store, urls: Sequence[str]) -> dict[str, list[str]]:
    """Url -> ids of the shards that the store knows and that may be this one, by their stem."""
    by_stem: dict[str, list[str]] = {}
    for shard in store.shard_ids():
        by_stem.setdefault(shard.rpartition("-")[0], []).append(shard)
    return {url: by_stem.get(stem_of(url), []) for url in urls}


def _choose_views(store: Store, policy: Policy, requested: int | None) -> int:
    """How many views: as said; else as many as the bank has; else four, or one without chance."""
    if requested is not None:
        if requested != 1 and not policy.random:
            message = f"{policy.line} leaves nothing to chance, so it has one view"
            raise UserError(message, setting=setting("num_views", requested))
        return requested
    if not policy.random:
        return 1
    views = [task.view for task in store.done() if task.kind == "bank" and task.id == policy.bank]
    return max(views) + 1 if views else 4
