"""Which of a store's targets a student is compared with."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from storage.errors import UserError, nearest
from storage.records import Record, digest_of
from storage.store import Store
from student.align import Given

ATTENTION = (("attention",), ("q", "k"), ("class_row",))  # the first that is there
TOKENS = (("tokens",),)


@dataclass(frozen=True)
class Reference:
    """A teacher in a store.

    Attributes:
        store: with its targets.
        teacher: its name.
        attention: the target of its attention, or of q and k; nothing where there is none.
        tokens: the target of its tokens; nothing where there is none.
        chosen: whether somebody named these; else what the store lacks of the evaluated images is left out.
    """

    store: Store
    teacher: str
    attention: tuple[Given, ...]
    tokens: tuple[Given, ...]
    chosen: bool = False

    @property
    def depth(self) -> int:
        """Its layers."""
        return int([*self.attention, *self.tokens][0].teacher["layers"])


def reference_of(store: Store, teacher: str | None, chosen: Sequence[str], bank: str) -> Reference:
    """What a student is compared with.

    Args:
        store: with targets.
        teacher: its name; None where only one has such targets.
        chosen: ids of targets, where there are several of a kind, of any bank.
        bank: id of the evaluation bank; of several targets of a kind, one that is there already is taken.

    Raises:
        UserError: an unknown name, nothing to compare with, or several and nobody said which.
    """
    targets = store.targets()
    for id in chosen:
        store.target(id)  # says what is near
    taps = {tap for several in (*ATTENTION, *TOKENS) for tap in several}
    usable = [m for m in targets.values() if m["identity"]["tap"] in taps]
    if teacher is not None and teacher not in (known := store.teachers()):
        raise UserError(f"{store.url}: no teacher is called {teacher!r}. {nearest(teacher, known)}")
    names = sorted({m["teacher"] for m in usable if not chosen or m["id"] in chosen})
    if teacher is None and len(names) > 1:
        raise UserError(f"{store.url} has several teachers: {', '.join(names)}; say which: --teacher {names[0]}")
    name = teacher or (names[0] if names else "")
    mine = [m for m in usable if m["teacher"] == name]
    attention, tokens = (_found(store, mine, kinds, chosen, bank) for kinds in (ATTENTION, TOKENS))
    if not (attention or tokens):
        there = sorted({m["identity"]["tap"] for m in targets.values() if teacher in (None, m["teacher"])})
        raise UserError(
            f"{store.url}: a student is compared with a teacher's attention (attention, q and k, or class_row) and "
            f"with its tokens, and {name or 'it'} has {', '.join(there) or 'no targets'}; add some: "
            "pipeline precompute --teacher NAME --target attention --target tokens,layers=1:12 …"
        )
    return Reference(store, name, attention, tokens, bool(chosen))


def _found(
    store: Store, mine: Sequence[Record], kinds: Sequence[tuple[str, ...]], chosen: Sequence[str], bank: str
) -> tuple[Given, ...]:
    """The targets of the first kind that is there; with a choice, of what is chosen alone."""
    for taps in kinds:
        alike: dict[str, list[tuple[Record, ...]]] = {}  # but for their banks
        for several in itertools.product(*([m for m in mine if m["identity"]["tap"] == tap] for tap in taps)):
            kept = [{k: v for k, v in m["identity"].items() if k != "bank"} for m in several]
            if len({m["identity"]["bank"] for m in several}) == 1 and all(
                k["layers"] == kept[0]["layers"] for k in kept
            ):
                alike.setdefault(digest_of(kept), []).append(several)
        if chosen:
            alike = {k: v for k, v in alike.items() if any(m["id"] in chosen for several in v for m in several)}
        if len(alike) > 1:
            there = {k: v for k, v in alike.items() if any(m["identity"]["bank"] == bank for m in (s[0] for s in v))}
            alike = there or alike
        if len(alike) > 1:
            ids = [str(v[0][0]["id"]) for v in alike.values()]
            raise UserError(f"{store.url}: {len(alike)} targets fit: {', '.join(ids)}; choose one: --target {ids[0]}")
        for groups in alike.values():
            return tuple(Given(m, store.teacher_of(m)) for m in groups[0])
    return ()
