"""Which bank a run writes to: the one that the request asks for, or the store's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from storage.errors import IdentityError, UserError, setting
from storage.shards.tar import stem_of
from storage.store.banks import policy_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from precompute.request import PrecomputeRequest
    from storage.shards.shard import Shard
    from storage.store.store import Store
    from storage.views.policy import Policy


_FIELDS = {"line": "view policy", "size": "view size", "seed": "seed"}  # of a policy -> what messages call it


def settle(store: Store, request: PrecomputeRequest) -> tuple[Policy, int, dict[str, list[str]], dict[str, Shard]]:
    """The policy and the number of views of a run: what was not said comes from the bank that the shards have already.

    Also url -> ids of shards that it may be, and url -> shard of those that had to be opened, which reads every file.

    Raises:
        IdentityError: the shards have views of another policy, size or seed, and no new bank was asked for.
        UserError: several banks fit, or several views of a policy that leaves nothing to chance.
    """
    known, policy = candidates(store, request.shards), request.policy
    opened: dict[str, Shard] = {}
    ids = {id for ids in known.values() for id in ids}
    done = [task for task in store.done() if task.kind == "bank" and task.shard in ids]
    if done and not request.new_bank and policy.bank not in {task.id for task in done}:
        for url in known:
            if (shard := store.recognize(url, known[url])) is not None:
                opened[url] = shard
        shards = {shard.id for shard in opened.values()}
        banks = sorted({task.id for task in done if task.shard in shards})
        if banks:
            policy = _fitting(store, [policy_of(store.bank(id)) for id in banks], request)
    return policy, _choose_views(store, policy, request.num_views), known, opened


def _fitting(store: Store, policies: Sequence[Policy], request: PrecomputeRequest) -> Policy:
    """The one of the policies that agrees with what was said."""
    differing = [_differing(policy, request) for policy in policies]
    fitting = [policy for policy, names in zip(policies, differing, strict=True) if not names]
    if len(fitting) > 1:
        raise UserError(
            f"{store.url}: these shards have views in {len(fitting)} banks: {', '.join(p.bank for p in fitting)}",
            hint=f"Choose one by {setting('view_policy', 'P')}, {setting('view_size', 'N')} and {setting('seed', 'N')}",
        )
    if not fitting:
        policy, name = policies[0], differing[0][0]
        hint = (
            "All targets of a training run need the same views, those of one bank. Omit the setting to use the "
            f"views that exist, or create others beside them: {setting('new_bank', True)}"
        )
        where, words = f"{store.url}: bank {policy.bank}", ("the store has", "asked for")
        expected, found = getattr(policy, name), getattr(request.policy, name)
        raise IdentityError(where, _FIELDS[name], expected, found, hint, words)
    return fitting[0]


def _differing(policy: Policy, request: PrecomputeRequest) -> list[str]:
    """Which of the fields that were said differ; a policy without chance has no seed."""
    names = [name for name in _FIELDS if name in request.policy_fields and (name != "seed" or policy.random)]
    return [name for name in names if getattr(policy, name) != getattr(request.policy, name)]


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
