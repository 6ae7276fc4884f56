"""Which bank and which targets of a store a recipe takes: the one that fits, or an error that says what to choose."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from storage.errors import IdentityError, UserError, call, setting
from storage.store.banks import policy_of
from storage.views.policy import policy as make_policy
from student.settings import settings_path

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from storage.store.manifests import TargetManifest
    from storage.store.store import Store
    from student.settings import BankChoice
    from student.targets.requirement import TargetRequirement


_WORDS = ("asked for", "the store has")

Found = tuple[str, ...]  # ids of targets that are read together, in the order of their taps


def select_targets(
    store: Store, shards: Sequence[str], needs: Sequence[TargetRequirement], bank: BankChoice
) -> tuple[str, dict[str, Found]]:
    """The bank's id, and loss -> ids of its targets.

    Args:
        store: with banks and targets.
        shards: ids of the shards that are trained on.
        needs: of the losses.
        bank: the recipe's choice of a bank.

    Raises:
        IdentityError: something that the store does not have, with field, expected and found.
        UserError: nothing fits, or several do.
    """
    manifests = store.targets()
    banks = _banks(store, shards, bank)
    fitting = {need.loss: _fitting(store, need, manifests, banks) for need in needs}
    shared = [
        b for b in banks if all(any(manifests[f[0]].identity.bank == b for f in fits) for fits in fitting.values())
    ]
    if not shared:
        raise UserError(
            f"{store.url}: no bank (views that targets share) has targets for all of {', '.join(fitting)}",
            hint="Precompute them with the same settings of views.",
        )
    if len(shared) > 1:
        hint = f"Choose one: {setting('stream.bank', shared[0])}"
        raise UserError(f"{store.url}: {len(shared)} banks fit: {', '.join(shared)}", hint=hint)
    chosen = {}
    for loss, fits in fitting.items():
        candidates = [ids for ids in fits if manifests[ids[0]].identity.bank == shared[0]]
        if len(candidates) > 1:
            names = [" with ".join(ids) for ids in candidates]
            first = candidates[0][0] if len(candidates[0]) == 1 else f"'[{', '.join(candidates[0])}]'"
            raise UserError(
                f"{store.url}: {loss}: {len(candidates)} targets fit: {', '.join(names)}",
                hint=f"Choose one: {setting(f'{settings_path(loss)}.target', first)}",
            )
        chosen[loss] = candidates[0]
    return shared[0], chosen


def _banks(store: Store, shards: Sequence[str], choice: BankChoice) -> list[str]:
    """Banks that have views of all the shards and are what the recipe asks for."""
    views = {(task.id, task.shard) for task in store.done() if task.kind == "bank"}
    policies = {
        id: policy_of(manifest)
        for id, manifest in store.banks().items()
        if all((id, shard) in views for shard in shards)
    }
    if not policies:
        hint = f"Run {call('precompute')} over them first."
        raise UserError(f"{store.url}: there are no views of all these shards", hint=hint)
    where = f"{store.url}: views"
    do = "A student is trained on the views that its targets were made from."
    if choice.id is not None:
        if choice.id not in policies:
            raise IdentityError(where, "stream.bank", choice.id, ", ".join(policies), do, _WORDS)
        policies = {choice.id: policies[choice.id]}
    line = make_policy(choice.policy, 32).line if choice.policy is not None else None
    for field, wanted in (("line", line), ("size", choice.size), ("seed", choice.seed)):
        if wanted is None:
            continue
        kept = {id: policy for id, policy in policies.items() if getattr(policy, field) == wanted}
        if not kept:
            found = ", ".join(str(getattr(policy, field)) for policy in policies.values())
            name = {"line": "policy"}.get(field, field)
            raise IdentityError(where, f"stream.bank.{name}", wanted, found, do, _WORDS)
        policies = kept
    return list(policies)


def _fitting(
    store: Store, need: TargetRequirement, manifests: Mapping[str, TargetManifest], banks: Sequence[str]
) -> list[Found]:
    """What serves a need: the first of its alternatives that the store has."""
    refused: list[UserError] = []
    for taps in need.taps:
        try:
            by_tap = [_of_tap(store, need, tap, manifests, banks) for tap in taps]
        except UserError as error:
            refused.append(error)
            continue
        groups = [ids for ids in itertools.product(*by_tap) if _together([manifests[id] for id in ids])]
        if groups:
            return groups
        refused.append(
            IdentityError(
                f"{store.url}: {need.loss}: {' and '.join(taps)}",
                "teacher, bank and layers",
                "the same of both",
                " and ".join(", ".join(ids) for ids in by_tap),
                f"Record them together: {call('precompute', '…', teacher='NAME', target=','.join(taps))}",
            )
        )
    many = len(refused) > 1 or len(need.taps[0]) > 1
    if many and not any(isinstance(error, IdentityError) for error in refused):
        in_store = sorted({manifest.identity.tap for manifest in manifests.values()})
        raise UserError(
            f"{store.url}: {need.loss} needs stored {need.words}, the store has {', '.join(in_store) or 'none'}",
            hint=f"Add them: {need.precompute()}",
        )
    raise next((error for error in refused if isinstance(error, IdentityError)), refused[0])


def _together(manifests: Sequence[TargetManifest]) -> bool:
    """Whether targets are of one teacher and bank, and those of layers of the same ones."""
    layers = {manifest.identity.layers for manifest in manifests if manifest.identity.layers}
    return len({(manifest.teacher, manifest.identity.bank) for manifest in manifests}) == 1 and len(layers) <= 1


def _of_tap(
    store: Store, need: TargetRequirement, tap: str, manifests: Mapping[str, TargetManifest], banks: Sequence[str]
) -> list[str]:
    """Ids of the targets of a tap that are as the need says."""
    fits = [id for id, manifest in manifests.items() if manifest.identity.tap == tap]
    if not fits:
        in_store = sorted({manifest.identity.tap for manifest in manifests.values()})
        raise UserError(
            f"{store.url}: {need.loss} needs stored {tap}, the store has {', '.join(in_store) or 'none'}",
            hint=f"Add them: {call('precompute', '…', teacher='NAME', target=tap)}",
        )
    conditions: list[tuple[str, object, Callable[[str], object]]] = []
    if need.target is not None:
        wanted = (need.target,) if isinstance(need.target, str) else need.target
        unknown = [id for id in wanted if id not in manifests]
        if unknown:
            raise IdentityError(
                f"{store.url}: stored {tap}",
                f"{settings_path(need.loss)}.target",
                unknown[0],
                ", ".join(sorted(fits)),
                words=_WORDS,
            )
        own = next((id for id in wanted if id in fits), wanted[0])
        conditions.append((f"{settings_path(need.loss)}.target", own, lambda id: id))
    if need.teacher is not None:
        conditions.append((f"{settings_path(need.loss)}.teacher", need.teacher, lambda id: manifests[id].teacher))
    if need.grid is not None:
        conditions.append(("patches a side", need.grid, lambda id: manifests[id].identity.grid))
    for field, wanted_value, of in conditions:
        kept = [id for id in fits if of(id) == wanted_value]
        if not kept:
            in_store = sorted({str(of(id)) for id in fits})
            where, words, hint = f"{store.url}: stored {tap}", _WORDS, "Take one of these, or precompute the other."
            if field == "patches a side":
                words = ("the student has", "the store has")
                hint = (
                    f"Keep them on this grid, too: {call('precompute', '…', target=f'{tap},grid={wanted_value}')}\n"
                    f"  Or let the student's img_size / patch_size be {' or '.join(in_store)}: "
                    f"{setting('student.patch_size', 'N')}\n"
                    f"  Or bring its maps to a stored grid: {setting(f'losses.{need.loss}.grid', in_store[-1])}"
                )
            raise IdentityError(where, field, wanted_value, ", ".join(in_store), hint, words)
        fits = kept
    within = [id for id in fits if manifests[id].identity.bank in banks]
    if not within:
        found = ", ".join(sorted({manifests[id].identity.bank for id in fits}))
        do = "Precompute the targets with the settings of these views, over all the shards."
        raise IdentityError(
            f"{store.url}: {', '.join(fits)}", "views", " or ".join(banks), found, do, ("asked for", "made from")
        )
    return within
