"""Which bank and which targets of a store a recipe takes: the one that fits, or an error that says what to choose."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from storage.errors import IdentityError, UserError, call, setting
from storage.store.banks import policy_of
from storage.views.policy import policy as make_policy
from student.settings import settings_path

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from storage.store.manifests import TargetManifest
    from storage.store.store import Store
    from student.settings import BankChoice
    from student.targets.requirement import TargetRequirement

_WORDS = ("asked for", "the store has")

TargetIds = tuple[str, ...]  # of targets that are read together, in the order of their taps


def select_targets(
    store: Store, shards: Sequence[str], needs: Sequence[TargetRequirement], bank: BankChoice
) -> tuple[str, dict[str, TargetIds]]:
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
    fitting: dict[str, dict[str, list[TargetIds]]] = {}  # loss -> bank -> candidates
    for need in needs:
        by_bank = fitting[need.loss] = {}
        for ids in _fitting(store.url, need, manifests, banks):
            by_bank.setdefault(manifests[ids[0]].identity.bank, []).append(ids)
    shared = [b for b in banks if all(b in by_bank for by_bank in fitting.values())]
    if not shared:
        problem = f"{store.url}: no bank (views that targets share) has targets for all of {', '.join(fitting)}"
        raise UserError(problem, hint="Precompute them with the same settings of views.")
    if len(shared) > 1:
        hint = f"Choose one: {setting('stream.bank', shared[0])}"
        raise UserError(f"{store.url}: {len(shared)} banks fit: {', '.join(shared)}", hint=hint)
    chosen = {}
    for loss, by_bank in fitting.items():
        candidates = by_bank[shared[0]]
        chosen[loss] = ids = candidates[0]
        if len(candidates) > 1:
            names = ", ".join(" with ".join(ids) for ids in candidates)
            first = ids[0] if len(ids) == 1 else f"'[{', '.join(ids)}]'"
            hint = f"Choose one: {setting(f'{settings_path(loss)}.target', first)}"
            raise UserError(f"{store.url}: {loss}: {len(candidates)} targets fit: {names}", hint=hint)
    return shared[0], chosen


def _banks(store: Store, shards: Sequence[str], choice: BankChoice) -> list[str]:
    """Banks that have views of all the shards and are what the recipe asks for."""
    views = {(task.id, task.shard) for task in store.done() if task.kind == "bank"}
    complete = {id: bank for id, bank in store.banks().items() if all((id, shard) in views for shard in shards)}
    policies = {id: policy_of(bank) for id, bank in complete.items()}
    if not policies:
        hint = f"Run {call('precompute')} over them first."
        raise UserError(f"{store.url}: no bank has views of all these shards", hint=hint)
    line = make_policy(choice.policy, 32).line if choice.policy is not None else None
    conditions: dict[str, tuple[object, dict[str, object]]] = {
        "stream.bank": (choice.id, {id: id for id in policies}),
        "stream.bank.policy": (line, {id: policy.line for id, policy in policies.items()}),
        "stream.bank.size": (choice.size, {id: policy.size for id, policy in policies.items()}),
        "stream.bank.seed": (choice.seed, {id: policy.seed for id, policy in policies.items()}),
    }
    banks = [*policies]
    for field, (required, values) in conditions.items():
        banks, previous = [id for id in banks if required in (None, values[id])], banks
        if not banks:
            has = ", ".join(str(values[id]) for id in previous)
            hint = "A student is trained on the views that its targets were made from."
            raise IdentityError(f"{store.url}: views", field, required, has, hint, _WORDS)
    return banks


def _fitting(
    url: str, need: TargetRequirement, manifests: Mapping[str, TargetManifest], banks: Sequence[str]
) -> list[TargetIds]:
    """What serves a need: the first of its alternatives that the store has."""
    refused: list[UserError] = []
    for taps in need.taps:
        try:
            by_tap = [_of_tap(url, need, tap, manifests, banks) for tap in taps]
        except UserError as error:
            refused.append(error)
            continue
        groups = [ids for ids in itertools.product(*by_tap) if _together([manifests[id] for id in ids])]
        if groups:
            return groups
        where, targets = f"{url}: {need.loss}: {' and '.join(taps)}", " and ".join(", ".join(ids) for ids in by_tap)
        hint = f"Record them together: {call('precompute', '…', teacher='NAME', target=','.join(taps))}"
        refused.append(IdentityError(where, "teacher, bank and layers", "the same of both", targets, hint))
    differs = next((error for error in refused if isinstance(error, IdentityError)), None)
    if differs is None and (len(refused) > 1 or len(need.taps[0]) > 1):
        raise _not_stored(url, need.loss, need.words, need.precompute(), manifests)
    raise differs or refused[0]


def _not_stored(url: str, loss: str, taps: str, command: str, manifests: Mapping[str, TargetManifest]) -> UserError:
    """The store has no target of the taps that a loss reads."""
    in_store = sorted({manifest.identity.tap for manifest in manifests.values()})
    return UserError(
        f"{url}: {loss} needs stored {taps}, the store has {', '.join(in_store) or 'none'}", hint=f"Add them: {command}"
    )


def _together(manifests: Sequence[TargetManifest]) -> bool:
    """Whether targets are of one teacher and bank, and those of layers of the same ones."""
    layers = {manifest.identity.layers for manifest in manifests if manifest.identity.layers}
    return len({(manifest.teacher, manifest.identity.bank) for manifest in manifests}) == 1 and len(layers) <= 1


def _of_tap(
    url: str, need: TargetRequirement, tap: str, manifests: Mapping[str, TargetManifest], banks: Sequence[str]
) -> list[str]:
    """Ids of the targets of a tap that are as the need says."""
    fits = [id for id, manifest in manifests.items() if manifest.identity.tap == tap]
    if not fits:
        command = call("precompute", "…", teacher="NAME", target=tap)
        raise _not_stored(url, need.loss, tap, command, manifests)
    where, path = f"{url}: stored {tap}", settings_path(need.loss)
    targets = (need.target,) if isinstance(need.target, str) else need.target or ()
    if unknown := [id for id in targets if id not in manifests]:
        raise IdentityError(where, f"{path}.target", unknown[0], ", ".join(sorted(fits)), words=_WORDS)
    own = next((id for id in targets if id in fits), targets[0]) if targets else None
    conditions: dict[str, tuple[object, dict[str, object]]] = {
        f"{path}.target": (own, {id: id for id in fits}),
        f"{path}.teacher": (need.teacher, {id: manifests[id].teacher for id in fits}),
        "patches a side": (need.grid, {id: manifests[id].identity.grid for id in fits}),
    }
    for field, (required, values) in conditions.items():
        fits, previous = [id for id in fits if required in (None, values[id])], fits
        if fits:
            continue
        in_store = sorted({str(values[id]) for id in previous})
        words, hint = _WORDS, "Take one of these, or precompute the other."
        if field == "patches a side":
            words = ("the student has", "the store has")
            hint = (
                f"Keep them on this grid, too: {call('precompute', '…', target=f'{tap},grid={required}')}\n"
                f"  Or let the student's img_size / patch_size be {' or '.join(in_store)}: "
                f"{setting('student.patch_size', 'N')}\n"
                f"  Or bring its maps to a stored grid: {setting(f'losses.{need.loss}.grid', in_store[-1])}"
            )
        raise IdentityError(where, field, required, ", ".join(in_store), hint, words)
    of_views = [id for id in fits if manifests[id].identity.bank in banks]
    if not of_views:
        other_banks = ", ".join(sorted({manifests[id].identity.bank for id in fits}))
        where, words = f"{url}: {', '.join(fits)}", ("asked for", "made from")
        hint = "Precompute the targets with the settings of these views, over all the shards."
        raise IdentityError(where, "views", " or ".join(banks), other_banks, hint, words)
    return of_views
