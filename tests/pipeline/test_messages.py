"""Texts of the lower rooms on the command line: what they mention can be pasted."""

from __future__ import annotations

import ast
import json
import pickle
import re
import shlex
from typing import TYPE_CHECKING

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cli import cli
from pipeline.console import show
from pipeline.messages import as_flags
from storage.errors import DamageError, IdentityError, UserError, call, setting
from student.recipe.schema import Recipe
from student.recipe.validate import section_of
from tests.conftest import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ROOMS = ("storage", "precompute", "student")  # whose texts mention settings and calls
AT_REST = (  # documents that are written into stores and runs show commands
    ROOT / "storage" / "store" / "card.py",
    ROOT / "student" / "models" / "card.py",
)
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


def test_texts_in_a_json_result_are_those_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    error = UserError("cannot be read", setting=setting("weights", "F"), hint=f"run {call('verify', store='S')} first")
    show({"failures": [{"error": str(error), "views": 2}], "ok": False}, [], as_json=True)
    result = json.loads(capsys.readouterr().out)
    text = "--weights F: cannot be read\n  run `pipeline verify --store S` first"
    assert result == {"failures": [{"error": text, "views": 2}], "ok": False}
    show({}, [str(error)], as_json=False)
    assert capsys.readouterr().out == f"{text}\n"


# ---------------------------------------------------------------------------------------------- what texts mention


def sources() -> Iterator[Path]:
    for room in ROOMS:
        yield from (ROOT / room).rglob("*.py")


def options_of(command: click.Command) -> set[str]:
    """The flags of a command and of its own commands."""
    below = command.commands.values() if isinstance(command, click.Group) else ()
    own = {flag for param in command.params for flag in param.opts}
    return own.union(*map(options_of, below))


def is_setting(name: str, command: click.Command) -> bool:
    """Whether a mentioned setting is an option, or of one with dots a path in a recipe, as far as its schema tells."""
    *parents, last = name.split(".")
    if not parents:
        return f"--{name.replace('_', '-')}" in options_of(command)
    section: object = Recipe
    for part in parents:
        if part not in section.model_fields:  # type: ignore[attr-defined]
            return False
        section = section_of(section, part)
        if section is None:  # what is below depends on the kind of loss
            return True
    return last in section.model_fields  # type: ignore[attr-defined]


def mentions() -> Iterator[tuple[str, str | None, list[str]]]:
    """Place, command (None: any) and settings of each `setting("name")` and `call("command", name=…)`."""
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or not node.args:
                continue
            first, where = node.args[0], f"{path.relative_to(ROOT)}:{node.lineno}"
            if not isinstance(first, ast.Constant) or not isinstance(first.value, str):
                continue
            if node.func.id == "setting":
                yield where, None, [first.value]
            elif node.func.id == "call":
                yield where, first.value, [word.arg for word in node.keywords if word.arg]


def test_what_texts_mention_are_commands_and_their_options_or_settings_of_recipes() -> None:
    found = list(mentions())
    assert {command for _, command, _ in found} >= {"pack", "precompute", None}
    assert sum(command is None for _, command, _ in found) > 40
    for where, name, settings in found:
        command = cli if name is None else cli.commands.get(name.replace("_", "-"))
        assert command is not None, f"{where}: no command is called {name}"
        wrong = [setting for setting in settings if not is_setting(setting, command)]
        assert not wrong, f"{where}: no such setting: {wrong}"


def test_rooms_below_the_command_line_mention_no_flags_and_no_commands() -> None:
    lines = [
        f"{path.relative_to(ROOT)}:{number}: {line}"
        for path in sources()
        if path not in AT_REST
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r"--[a-z]|pipeline [a-z]", line)
    ]
    assert lines == []
