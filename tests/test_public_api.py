"""The public names: each can be imported, costs nothing before it is used, and has a place in the reference."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipeline", "precompute", "storage", "student")
NAMES = [(package, name) for package in PACKAGES for name in importlib.import_module(package).__all__]


def page(package: str) -> str:
    return (ROOT / "docs" / "reference" / f"{package}.md").read_text()


def arguments(value: Any) -> list[str]:
    """What a caller gives; none of a recipe's sections, which docs/recipes.md describes."""
    if isinstance(value, type):
        if dataclasses.is_dataclass(value):
            return [field.name for field in dataclasses.fields(value)]
        if issubclass(value, BaseModel) or "__init__" not in vars(value) or getattr(value, "_is_protocol", False):
            return []
    return [name for name in inspect.signature(value).parameters if name != "self"]


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_each_name_has_a_docstring_that_describes_its_arguments(package: str, name: str) -> None:
    value = getattr(importlib.import_module(package), name)
    assert value.__doc__
    _, _, described = inspect.cleandoc(value.__doc__).partition(
        "\nAttributes:\n" if dataclasses.is_dataclass(value) else "\nArgs:\n"
    )
    assert re.findall(r"^ {4}(\w+): ", described.partition("\nRaises:")[0], re.MULTILINE) == arguments(value)
    if inspect.isfunction(value):
        assert re.search(r"^Raises:\n {4}\w+: ", inspect.cleandoc(value.__doc__), re.MULTILINE)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_reference_has_exactly_the_public_names(package: str) -> None:
    public = sorted(importlib.import_module(package).__all__)
    assert sorted(re.findall(rf"^::: {package}\.(\w+)$", page(package), re.MULTILINE)) == public
    (listed,) = re.findall(rf"^\| \[`{package}`\].*\| (.*) \|$", page("index"), re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", listed)) == public


@pytest.mark.parametrize("package", PACKAGES)
def test_members_that_the_reference_shows_have_docstrings(package: str) -> None:
    for name, members in re.findall(r"^::: \w+\.(\w+)\n +options:\n +members: \[(.*)\]$", page(package), re.MULTILINE):
        value = getattr(importlib.import_module(package), name)
        for member in filter(None, members.split(", ")):
            assert inspect.getdoc(inspect.getattr_static(value, member)), (name, member)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_is_typed_has_the_version_of_the_project_and_no_other_names(package: str) -> None:
    module = importlib.import_module(package)
    assert (ROOT / package / "py.typed").is_file()
    assert module.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert set(module.__all__) < set(dir(module))
    with pytest.raises(ImportError, match="nothing"):
        exec(f"from {package} import nothing")


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import pipeline, precompute, storage, student", {"click", "numpy", "pydantic", "torch", "zarr"}),
        ("from storage import *", {"torch", "timm", "webdataset"}),
        ("from precompute import PrecomputeRequest, find_teacher, precompute", {"torch", "timm", "webdataset"}),
    ],
)
def test_names_load_what_they_need_and_no_more(code: str, absent: set[str]) -> None:
    check = f"{code}\nimport sys\nassert not {absent!r} & set(sys.modules), {absent!r} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)
