"""Which bank and which targets of a store a recipe takes: the one that fits, or an error that says what to choose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from storage.banks import policy_of
from storage.errors import IdentityError, UserError
from storage.policies import policy as make_policy
from storage.records import Record
from storage.store import Store
from student.config import Bank


@dataclass(frozen=True)
class Need:
    """What a loss wants to read: a tap, and what the recipe says of its teacher and target."""

    loss: str
    tap: str
    teacher: str | None = None
    target: str | tuple[str, ...] | None = None
    grid: int | None = None


def choose(store: Store, shards: Sequence[str], needs: Sequence[Need], bank: Bank) -> tuple[str, dict[str, str]]:
    """The bank's id, and loss -> target id.

    Args:
        store: with banks and targets.
        shards: ids of the shards that are trained on.
        needs: of the losses.
        bank: the recipe's wish.

    Raises:
        IdentityError: a wish that the store does not meet, with field, expected and found.
        UserError: nothing fits, or several do.
    """
    manifests = store.targets()
    banks = _banks(store, shards, bank)
    fitting: dict[str, list[str]] = {need.loss: _fitting(store, need, manifests, banks) for need in needs}
    shared = [b for b in banks if all(any(_bank(manifests[t]) == b for t in fit) for fit in fitting.values())]
    if not shared:
        raise UserError(
            f"{store.url}: no bank has targets for all of {', '.join(fitting)}; precompute them over one bank"
        )
    if len(shared) > 1:
        raise UserError(
            f"{store.url}: {len(shared)} banks fit: {', '.join(shared)}; choose one: --set stream.bank={shared[0]}"
        )
    chosen = {}
    for need in needs:
        candidates = [t for t in fitting[need.loss] if _bank(manifests[t]) == shared[0]]
        if len(candidates) > 1:
            raise UserError(
                f"{store.url}: {need.loss}: {len(candidates)} targets fit: {', '.join(candidates)}; choose one: "
                f"--set losses.{need.loss}.target={candidates[0]}"
            )
        chosen[need.loss] = candidates[0]
    return shared[0], chosen


def _bank(manifest: Record) -> str:
    return str(manifest["identity"]["bank"])


def _banks(store: Store, shards: Sequence[str], wish: Bank) -> list[str]:
    """Banks that have views of all the shards and are what the recipe wishes."""
    views = {(task.id, task.shard) for task in store.done() if task.kind == "bank"}
    there = {
        id: policy_of(manifest)
        for id, manifest in store.banks().items()
        if all((id, shard) in views for shard in shards)
    }
    if not there:
        raise UserError(f"{store.url}: no bank has views of all these shards; run precompute over them first")
    where = f"{store.url}: bank"
    do = "A student is trained on the views that its targets were made from."
    if wish.id is not None:
        if wish.id not in there:
            raise IdentityError(where, "stream.bank", wish.id, ", ".join(there), do)
        there = {wish.id: there[wish.id]}
    line = make_policy(wish.policy, 32).line if wish.policy is not None else None
    for field, wanted in (("line", line), ("size", wish.size), ("seed", wish.seed)):
        if wanted is None:
            continue
        kept = {id: policy for id, policy in there.items() if getattr(policy, field) == wanted}
        if not kept:
            found = ", ".join(str(getattr(policy, field)) for policy in there.values())
            name = {"line": "policy"}.get(field, field)
            raise IdentityError(where, f"stream.bank.{name}", wanted, found, do)
        there = kept
    return list(there)


def _fitting(store: Store, need: Need, manifests: Mapping[str, Record], banks: Sequence[str]) -> list[str]:
    fits = [id for id, manifest in manifests.items() if manifest["identity"]["tap"] == need.tap]
    if not fits:
        there = sorted({manifest["identity"]["tap"] for manifest in manifests.values()})
        raise UserError(
            f"{store.url}: {need.loss} needs a target of tap {need.tap}, the store has {', '.join(there) or 'none'}; "
            f"add one: pipeline precompute --teacher NAME --target {need.tap} …"
        )
    wishes: list[tuple[str, object, Callable[[str], object]]] = []
    if need.target is not None:
        wishes.append((f"losses.{need.loss}.target", need.target, lambda id: id))
    if need.teacher is not None:
        wishes.append((f"losses.{need.loss}.teacher", need.teacher, lambda id: manifests[id]["teacher"]))
    if need.grid is not None:
        wishes.append(("grid of the student's patches", need.grid, lambda id: manifests[id]["identity"]["grid"]))
    for field, wanted, of in wishes:
        kept = [id for id in fits if of(id) == wanted]
        if not kept:
            found = ", ".join(sorted({str(of(id)) for id in fits}))
            raise IdentityError(f"{store.url}: targets of tap {need.tap}", field, wanted, found)
        fits = kept
    within = [id for id in fits if _bank(manifests[id]) in banks]
    if not within:
        found = ", ".join(sorted({_bank(manifests[id]) for id in fits}))
        raise IdentityError(f"{store.url}: bank of {', '.join(fits)}", "bank", " or ".join(banks), found)
    return within
