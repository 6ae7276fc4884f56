"""Which of a store's targets a student is compared with."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from storage.errors import UserError, did_you_mean
from storage.objects.json_record import Record, digest_of
from storage.store.store import Store
from storage.views.policy import Policy
from student.targets.evaluation_views import kept_of
from student.targets.stored_target import StoredTarget

# Taps that serve, those of one kind together; the first kind that is there is taken.
ATTENTION = (("attention",), ("q", "k"), ("class_row",))
TOKENS = (("tokens",),)
_Found = tuple[StoredTarget, ...]


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
    attention: _Found
    tokens: _Found
    missing: str = ""


def find_teacher_targets(
    store: Store, teacher: str | None, chosen: Sequence[str], urls: Sequence[str], view: Policy
) -> TeacherTargets:
    """What a student is compared with: of what the store has, that which it has of the images that are evaluated.

    Args:
        store: with targets.
        teacher: its name; None where only one has such targets.
        chosen: ids of targets, of any bank, where there are several of a kind.
        urls: shards that are evaluated.
        view: in which.

    Raises:
        UserError: an unknown name, nothing to compare with, or several and nobody said which.
    """
    targets = {id: store.target(id) for id in chosen} | store.targets()
    parts = {tap: part for part in (ATTENTION, TOKENS) for several in part for tap in several}
    usable = [m for m in targets.values() if m["identity"]["tap"] in parts]
    if teacher is not None and teacher not in (known := store.teachers()):
        raise UserError(f"{store.url}: no teacher is called {teacher!r}. {did_you_mean(teacher, known)}")
    names = sorted({m["teacher"] for m in usable if not chosen or m["id"] in chosen})
    if teacher is None and len(names) > 1:
        raise UserError(f"{store.url} has several teachers: {', '.join(names)}; say which: --teacher {names[0]}")
    name = teacher or (names[0] if names else "")
    mine = [m for m in usable if m["teacher"] == name]
    for id in chosen:
        if id not in {m["id"] for m in mine}:
            raise UserError(
                f"--target {id}: {targets[id]['identity']['tap']} of {targets[id]['teacher']}; a student is compared "
                f"with attention (attention, q and k, or class_row) and tokens of one teacher{name and f', {name}'}"
            )

    def there(given: _Found) -> bool:
        return not kept_of(store, given, urls, view)[1]

    wanted = [[id for id in chosen if parts[targets[id]["identity"]["tap"]] is part] for part in (ATTENTION, TOKENS)]
    attention = _pick(store, mine, ATTENTION, wanted[0], there)
    tokens = _pick(store, mine, TOKENS, wanted[1], there)
    if not (attention or tokens):
        taps = sorted({m["identity"]["tap"] for m in targets.values() if teacher in (None, m["teacher"])})
        raise UserError(
            f"{store.url}: a student is compared with a teacher's attention (attention, q and k, or class_row) and "
            f"with its tokens, and {name or teacher or 'it'} has {', '.join(taps) or 'no targets'}; add some: "
            "pipeline precompute --teacher NAME --target attention --target tokens,layers=1:12 …"
        )
    if attention and tokens:
        missing = "which the store has not of all these images"
        match there(attention), there(tokens):
            case True, False if not wanted[1]:
                return TeacherTargets(store, name, attention, (), f"tokens, {missing}")
            case False, True if not wanted[0]:
                return TeacherTargets(store, name, (), tokens, f"attention, {missing}")
    return TeacherTargets(store, name, attention, tokens)


def _pick(
    store: Store, mine: Sequence[Record], kinds: Sequence[tuple[str, ...]], wanted: Sequence[str],
    there: Callable[[_Found], bool],
) -> _Found:  # fmt: skip
    """The targets of one part: those wanted, else of the first kind that is there for the images, else in the store."""
    by_kind = [_alike(mine, taps) for taps in kinds]
    if wanted:
        ids = {*wanted}
        fits = [every for several in by_kind for every in several if ids <= {m["id"] for one in every for m in one}]
        if not fits:
            raise UserError(f"{store.url}: {' and '.join(wanted)} are not of one kind and the same layers; name fewer")
        return _only(store, fits)
    for several in by_kind:
        if fits := [every for every in several if there(_given(store, every[0]))]:
            return _only(store, fits)
    return next((_only(store, several) for several in by_kind if several), ())


def _alike(mine: Sequence[Record], taps: Sequence[str]) -> list[list[tuple[Record, ...]]]:
    """Targets of these taps that are read together; those that differ in their bank alone stand in one list."""
    found: dict[str, list[tuple[Record, ...]]] = {}
    for several in itertools.product(*([m for m in mine if m["identity"]["tap"] == tap] for tap in taps)):
        kept = [{k: v for k, v in m["identity"].items() if k != "bank"} for m in several]
        if len({m["identity"]["bank"] for m in several}) == 1 and all(k["layers"] == kept[0]["layers"] for k in kept):
            found.setdefault(digest_of(kept), []).append(several)
    return list(found.values())


def _only(store: Store, fits: Sequence[Sequence[tuple[Record, ...]]]) -> _Found:
    """The one that fits. Raises UserError: several do."""
    if len(fits) > 1:
        names = [" with ".join(m["id"] for m in every[0]) for every in fits]
        flags = " ".join(f"--target {m['id']}" for m in fits[0][0])
        raise UserError(f"{store.url}: {len(fits)} targets fit: {', '.join(names)}; choose one: {flags}")
    return _given(store, fits[0][0])


def _given(store: Store, several: Sequence[Record]) -> _Found:
    return tuple(StoredTarget(m, store.teacher_of(m)) for m in several)
