"""Texts of the lower rooms on the command line: what they mention can be pasted."""

from __future__ import annotations

import pickle
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.messages import as_flags
from storage.errors import DamageError, IdentityError, UserError, call, setting

VALUES = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"], exclude_characters="`"), min_size=1, max_size=12)


@given(st.lists(VALUES, max_size=2), st.dictionaries(st.sampled_from(["store", "view_size", "a.b"]), VALUES))
def test_a_call_becomes_the_command_with_the_same_words(words: list[str], named: dict[str, str]) -> None:
    words = [word for word in words if "=" not in word and word != "…"]
    named = {name: value for name, value in named.items() if value != "True"}
    flags = {"store": ["--store", "{}"], "view_size": ["--view-size", "{}"], "a.b": ["--set", "a.b={}"]}
    expected = ["pipeline", "fit-teacher", *words]
    for name, value in named.items():
        expected += [word.format(value) if "{}" in word else word for word in flags[name]]
    assert shlex.split(as_flags(call("fit_teacher", *words, **named))) == expected


def test_settings_become_flags_and_other_words_stay() -> None:
    text = (
        f"give {setting('new_bank', True)}, {setting('stream.bank', 'B-1')} or {setting('weights', 'F')}; see `x.tar`"
    )
    assert as_flags(text) == "give --new-bank, --set stream.bank=B-1 or --weights F; see `x.tar`"
    assert as_flags(f"run {call('verify', store='S')} first") == "run `pipeline verify --store S` first"
    assert as_flags(f"x\n  {call('train', '…', val=['a', 'b'])}") == "x\n  pipeline train --val a --val b …"


@pytest.mark.parametrize(
    "error",
    [
        UserError("cannot be read", setting=setting("weights", "F"), hint="give another"),
        IdentityError("S", "size", 1, 2, "do this", ("the store has", "asked for")),
        DamageError("S/x: missing"),
    ],
)
def test_errors_travel_between_processes_whole(error: UserError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), vars(copy), type(copy)) == (str(error), vars(error), type(error))
