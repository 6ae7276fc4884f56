"""The code keeps its shape: no circle of files, no folder that is too large to be seen at once."""

from __future__ import annotations

import ast
from itertools import pairwise
from typing import TYPE_CHECKING

from tests.layout import MAX_FILES, ROOT, file_imports, folder_sizes, import_circles

if TYPE_CHECKING:
    from pathlib import Path


def test_no_files_import_each_other_in_a_circle():
    imports = file_imports()
    assert "storage.errors" in imports["storage.store.store"]  # the graph holds what it should
    assert import_circles(imports) == []


def test_no_folder_holds_too_many_code_files():
    sizes = folder_sizes(ROOT)
    assert {"storage/store", "tests/storage/store"} <= {folder for folder, _ in sizes}
    assert [(folder, size) for folder, size in sizes if size > MAX_FILES] == []


def test_circles_are_found_each_once():
    imports = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set[str](), "e": {"e"}}
    short, long = sorted(import_circles(imports), key=len)
    assert short == ["e", "e"]
    assert long[0] == long[-1]
    assert {*pairwise(long)} == {("a", "b"), ("b", "c"), ("c", "a")}


def test_a_docstring_alone_makes_no_code_file(tmp_path: Path):
    folder = tmp_path / "storage" / "inner"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text('"""What lies here."""\n')
    (folder.parent / "__init__.py").write_text('"""What lies here."""\n\nX = 1\n')
    (folder / "a.py").write_text("")
    (folder / "b.py").write_text("")
    assert folder_sizes(tmp_path) == [("storage/inner", 2), ("storage", 1)]


def test_docstrings_can_be_read_alone():
    """None leans on the one before it."""
    leaning = [
        f"{path.relative_to(ROOT)}:{node.body[0].lineno}"
        for room in ("storage", "precompute", "student", "pipeline")
        for path in (ROOT / room).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and (ast.get_docstring(node) or "").startswith(("Of ", "The same ", "Likewise"))
    ]
    assert leaning == []
