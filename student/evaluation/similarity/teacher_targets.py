"""Which of a store's targets a student is compared with."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from storage.errors import UserError, call, did_you_mean, setting
from student.targets.evaluation_views import kept_of
from student.targets.stored_target import StoredTarget

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from storage.shards.shard import Shard
    from storage.store.manifests import TargetManifest
    from storage.store.store import Store
    from storage.views.policy import Policy

    _Banks = list[tuple[TargetManifest, ...]]  # targets that are read together, each time of another bank

# Taps that serve, those of one kind together; the first kind that is there is taken.
ATTENTION = (("attention",), ("q", "k"), ("class_row",))
TOKENS = (("tokens",),)
_Stored = tuple[StoredTarget, ...]


@dataclass(frozen=True)
class TeacherTargets:
    """A teacher in a store.

    Attributes:
        store: with its targets.
        teacher: its name.
        attention: the target of its attention, or of q and k; nothing where there is none.
        tokens: the target of its tokens; nothing where there is none.
        missing: in words, which of the two the store has, but not of the images that are evaluated.
    """

    store: Store
    teacher: str
    attention: _Stored
    tokens: _Stored
    missing: str = ""


def find_teacher_targets(
    store: Store, teacher: str | None, chosen: Sequence[str], shards: Sequence[Shard], view: Policy
) -> TeacherTargets:
    """What a student is compared with: of what the store has, that which it has of the images that are evaluated.

    Args:
        store: with targets.
        teacher: its name; None where only one has such targets.
        chosen: ids of targets, of any bank, where there are several of a kind.
        shards: that are evaluated.
        view: in which.

    Raises:
        UserError: an unknown name, nothing to compare with, or several and nobody said which.
    """
    targets = {id: store.target(id) for id in chosen} | store.targets()
    parts = {tap: part for part in (ATTENTION, TOKENS) for taps in part for tap in taps}
    usable = [manifest for manifest in targets.values() if manifest.identity.tap in parts]
    if teacher is not None and teacher not in (known := store.teachers()):
        raise UserError(f"{store.url}: no teacher is called {teacher!r}. {did_you_mean(teacher, known)}")
    names = sorted({manifest.teacher for manifest in usable if not chosen or manifest.id in chosen})
    if teacher is None and len(names) > 1:
        hint = f"Choose one: {setting('teacher', names[0])}"
        raise UserError(f"{store.url} has several teachers: {', '.join(names)}", hint=hint)
    name = teacher or next(iter(names), "")
    candidates = [manifest for manifest in usable if manifest.teacher == name]
    for id in chosen:
        if id not in {manifest.id for manifest in candidates}:
            raise UserError(
                f"{targets[id].identity.tap} of {targets[id].teacher}; a student is compared with attention "
                f"(attention, q and k, or class_row) and tokens of one teacher{name and f', {name}'}",
                setting=setting("target", id),
            )

    def complete(stored: _Stored) -> bool:
        return not kept_of(store, stored, shards, view)[1]

    ids = [[id for id in chosen if parts[targets[id].identity.tap] is part] for part in (ATTENTION, TOKENS)]
    attention, tokens = (
        _pick(store, [_alike(candidates, taps) for taps in part], part_ids, complete)
        for part, part_ids in zip((ATTENTION, TOKENS), ids, strict=True)
    )
    if not (attention or tokens):
        taps = sorted({m.identity.tap for m in targets.values() if teacher in (None, m.teacher)})
        raise UserError(
            f"{store.url}: a student is compared with a teacher's attention (attention, q and k, or class_row) and "
            f"with its tokens, and {name or teacher or 'it'} has {', '.join(taps) or 'no targets'}",
            hint=f"Add some: {call('precompute', '…', teacher='NAME', target=['attention', 'tokens,layers=1:12'])}",
        )
    if attention and tokens:
        missing = "which the store has not of all these images"
        match complete(attention), complete(tokens):
            case True, False if not ids[1]:
                return TeacherTargets(store, name, attention, (), f"tokens, {missing}")
            case False, True if not ids[0]:
                return TeacherTargets(store, name, (), tokens, f"attention, {missing}")
    return TeacherTargets(store, name, attention, tokens)


def _pick(
    store: Store, by_kind: Sequence[list[_Banks]], ids: Sequence[str], complete: Callable[[_Stored], bool]
) -> _Stored:
    """The targets of one part: those of `ids`, else of the first kind that the images have, else that the store has."""
    if ids:
        fits = [banks for kind in by_kind for banks in kind if {*ids} <= {m.id for targets in banks for m in targets}]
        if not fits:
            raise UserError(f"{store.url}: {' and '.join(ids)} are not of one kind and the same layers; name fewer")
        return _only(store, fits)
    for kind in by_kind:
        if fits := [banks for banks in kind if complete(_stored(store, banks[0]))]:
            return _only(store, fits)
    return next((_only(store, kind) for kind in by_kind if kind), ())


def _alike(candidates: Sequence[TargetManifest], taps: Sequence[str]) -> list[_Banks]:
    """Targets of these taps that are read together; those that differ in their bank alone stand in one list."""
    by_identity: dict[tuple[str, ...], _Banks] = {}
    for targets in itertools.product(*([m for m in candidates if m.identity.tap == tap] for tap in taps)):
        identities = [manifest.identity for manifest in targets]
        if len({(identity.bank, identity.layers) for identity in identities}) == 1:
            same = tuple(identity.model_copy(update={"bank": ""}).digest for identity in identities)
            by_identity.setdefault(same, []).append(targets)
    return list(by_identity.values())


def _only(store: Store, fits: Sequence[_Banks]) -> _Stored:
    """The one that fits. Raises UserError: several do."""
    if len(fits) > 1:
        names = [" with ".join(manifest.id for manifest in banks[0]) for banks in fits]
        hint = f"Choose one: {' '.join(setting('target', manifest.id) for manifest in fits[0][0])}"
        raise UserError(f"{store.url}: {len(fits)} targets fit: {', '.join(names)}", hint=hint)
    return _stored(store, fits[0][0])


def _stored(store: Store, targets: Sequence[TargetManifest]) -> _Stored:
    return tuple(StoredTarget(target=manifest, teacher=store.teacher_of(manifest)) for manifest in targets)
