"""Which bank a run writes to: the one that the request asks for, or the store's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from storage.errors import IdentityError, UserError, setting
from storage.shards.tar import stem_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from precompute.request import PrecomputeRequest
    from storage.shards.shard import Shard
    from storage.store.store import Store
    from storage.views.policy import Policy


def choose_policy(
    store: Store,
    wanted: Policy,
    *,
    fields: Collection[str],
    candidates: Collection[str],
    recognize: Callable[[], set[str]],
    new_bank: bool,
) -> Policy:
    """The policy of this run: what was not said comes from the bank that the shards have already.

    Args:
        store: with its banks.
        wanted: policy, size and seed, said or by default.
        fields: which of `line`, `size` and `seed` were said.
        candidates: ids of known shards that these may be, by their names.
        recognize: gives those that they are; it reads every file, so it is called only where it matters.
        new_bank: another bank beside the one that is there is wanted.

    Raises:
        IdentityError: the shards have views of another policy, size or seed, and no new bank was asked for.
    """
    from storage.store.banks import policy_of

    done = [task for task in store.done() if task.kind == "bank" and task.shard in candidates]
    banks = sorted({task.id for task in done})
    if not banks or wanted.bank in banks or new_bank:
        return wanted
    shards = recognize()
    policies = [policy_of(store.bank(id)) for id in sorted({task.id for task in done if task.shard in shards})]
    if not policies:
        return wanted
    fitting = [policy for policy in policies if not _differing(policy, wanted, fields)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise UserError(
            f"{store.url}: these shards have views in {len(fitting)} banks: {', '.join(p.bank for p in fitting)}",
            hint=f"Choose one by {setting('view_policy', 'P')}, {setting('view_size', 'N')} and {setting('seed', 'N')}",
        )
    policy, name = policies[0], _differing(policies[0], wanted, fields)[0]
    field = {"line": "view policy", "size": "view size", "seed": "seed"}[name]
    hint = (
        "All targets of a training run need the same views, those of one bank. Leave the setting out to use the views "
        f"that exist, or make others beside them: {setting('new_bank', True)}"
    )
    words = ("the store has", "asked for")
    raise IdentityError(
        f"{store.url}: bank {policy.bank}", field, getattr(policy, name), getattr(wanted, name), hint, words
    )


def _differing(policy: Policy, wanted: Policy, fields: Collection[str]) -> list[str]:
    """Which of the fields that were said differ; a policy without chance has no seed."""
    names = [name for name in ("line", "size", "seed") if name in fields and (name != "seed" or policy.random)]
    return [name for name in names if getattr(policy, name) != getattr(wanted, name)]


def settle(
    store: Store, wanted: PrecomputeRequest, known: Mapping[str, Sequence[str]]
) -> tuple[Policy, int, dict[str, Shard]]:
    """The policy, the number of views, and url -> shard of those that had to be opened for it.

    Args:
        store: with its banks.
        wanted: what was asked for.
        known: url -> ids of shards that it may be, as `candidates` gives them.

    Raises:
        UserError: as `choose_policy` does, or several views of a policy that leaves nothing to chance.
    """
    opened: dict[str, Shard] = {}

    def recognized() -> set[str]:
        for url, ids in known.items():
            if (shard := store.recognize(url, ids)) is not None:
                opened[url] = shard
        return {shard.id for shard in opened.values()}

    policy = choose_policy(
        store,
        wanted.policy,
        fields=wanted.policy_fields,
        candidates={id for ids in known.values() for id in ids},
        recognize=recognized,
        new_bank=wanted.new_bank,
    )
    return policy, choose_views(store, policy, wanted.num_views), opened


def candidates(store: Store, urls: Sequence[str]) -> dict[str, list[str]]:
    """Url -> ids of the shards that the store knows and that may be this one, by their stem."""
    by_stem: dict[str, list[str]] = {}
    for shard in store.shard_ids():
        by_stem.setdefault(shard.rpartition("-")[0], []).append(shard)
    return {url: by_stem.get(stem_of(url), []) for url in urls}


def choose_views(store: Store | None, policy: Policy, wanted: int | None) -> int:
    """How many views: as said; else as many as the bank has; else four, or one without chance."""
    if not policy.random:
        if wanted not in (None, 1):
            message = f"{policy.line} leaves nothing to chance, so it has one view"
            raise UserError(message, setting=setting("num_views", wanted))
        return 1
    if wanted is not None:
        return wanted
    views = [task.view for task in (store.done() if store else ()) if task.kind == "bank" and task.id == policy.bank]
    return max(views) + 1 if views else 4
