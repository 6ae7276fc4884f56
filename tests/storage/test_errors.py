"""What an error says: never nothing, and by one function wherever an error of somebody else is told."""

from __future__ import annotations

import ast
import zlib

import pytest
from PIL import Image

from storage.errors import first_line
from storage.views.render import BadImage, decode, size_in
from tests.conftest import ROOT

OWN = {"UserError", "BadImage", "DamageError", "IdentityError", "click"}  # these have words


@pytest.mark.parametrize(
    ("error", "line", "with_kind"),
    [
        (ValueError("no such mode"), "no such mode", "ValueError: no such mode"),
        (ValueError(), "ValueError", "ValueError"),
        (AssertionError(""), "AssertionError", "AssertionError"),
        (RuntimeError("\n  first\nsecond"), "first", "RuntimeError: first"),
        (RuntimeError(" \n\t"), "RuntimeError", "RuntimeError"),
        (RuntimeError("\x1b[31mred\x1b[0m"), "red", "RuntimeError: red"),
        (OSError(13, "Permission denied", "/x"), "Permission denied", "OSError: Permission denied"),
        (OSError("image file is truncated"), "image file is truncated", "OSError: image file is truncated"),
        (OSError(), "OSError", "OSError"),
        (zlib.error("Error -3"), "Error -3", "error: Error -3"),
    ],
    ids=repr,
)
def test_an_error_says_something_on_one_line(error: Exception, line: str, with_kind: str) -> None:
    expected = with_kind.replace("OSError: Permission", "PermissionError: Permission")
    assert (first_line(error), first_line(error, kind=True)) == (line, expected)


@pytest.mark.parametrize("error", [SyntaxError(), EOFError(), AssertionError(), KeyError()], ids=repr)
def test_a_decoder_that_raises_without_a_text_is_named_by_what_it_raises(tmp_path, monkeypatch, error) -> None:
    def opened(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Image, "open", opened)
    (tmp_path / "x.png").write_bytes(b"")
    for read in (lambda: decode(b""), lambda: size_in(tmp_path / "x.png")):
        with pytest.raises(BadImage, match=rf"^cannot be decoded: {type(error).__name__}$"):
            read()


def told_by_themselves(tree: ast.AST) -> list[int]:
    """Lines on which an error of somebody else goes into a text without `first_line`."""
    found = []
    for handler in (node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.name):
        kinds = {name.id for name in ast.walk(handler.type or ast.Name("")) if isinstance(name, ast.Name)}
        if kinds and kinds <= OWN:
            continue
        for text in (node.value for node in ast.walk(handler) if isinstance(node, ast.FormattedValue)):
            names = {node.id for node in ast.walk(text) if isinstance(node, ast.Name)}
            attributes = {node.attr for node in ast.walk(text) if isinstance(node, ast.Attribute)}
            told = {"first_line", "_why", "type"} & names or attributes - {"strerror", "args"}
            if handler.name in names and not told:
                found.append(text.lineno)
    return found


def test_every_error_of_somebody_else_is_told_by_one_function() -> None:
    assert told_by_themselves(ast.parse('try: x\nexcept ValueError as e: y(f"{e}")')) == [2]
    assert told_by_themselves(ast.parse('try: x\nexcept OSError as e: y(f"{e.strerror or e}")')) == [2]
    places = [path for room in ("storage", "precompute", "student", "pipeline") for path in (ROOT / room).rglob("*.py")]
    found = {str(path.relative_to(ROOT)): told_by_themselves(ast.parse(path.read_text())) for path in places}
    assert {path: lines for path, lines in found.items() if lines} == {}
