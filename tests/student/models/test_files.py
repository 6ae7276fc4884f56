"""A student's file is anybody's: what it says is held against types and bounds before a network is made of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from storage.errors import UserError
from storage.objects.weights_file import WeightsFile
from student import settings as config
from student.models.build import build_student
from student.models.files import StudentDescription, load_student, save_student

if TYPE_CHECKING:
    from pathlib import Path

ABOUT: dict[str, Any] = {"img_size": 32, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "classes": ("a", "b", "c")}
COPYING = {
    "layers": [1],
    "heads": 3,
    "settings": {},
    "store": "S",
    "teacher": "t",
    "targets": ["t-q"],
    "graphs": [["a" * 64, 0]],
    "permute": None,
}
DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = config.StudentConfig(
        model="vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=12, depth=1, num_heads=3
    )
    model, arguments = build_student(settings, 3)
    path = tmp_path_factory.mktemp("student") / "last.safetensors"
    about = StudentDescription(model=settings.model, arguments=arguments, evaluation="short(1)|center", **ABOUT)
    save_student(path, model, about)
    return path


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as opened:
        return dict(opened.metadata())


def test_what_was_written_is_read(file):
    _, about = load_student(file)
    assert {name: getattr(about, name) for name in ABOUT} == ABOUT


def test_attention_copy_is_read_under_the_names_of_today(file, tmp_path):
    before, path = (
        {"what": "q", "average": "none", "layers": None, "temperature": None},
        tmp_path / "copies.safetensors",
    )
    header = {**metadata(file), "copying": json.dumps({**COPYING, "settings": before})}
    save_file(load_file(file), path, header)
    _, about = load_student(path)
    now = {"tensors": "q", "average": "none", "layers": None, "head_temperature": None}
    assert about.attention_copy
    assert about.attention_copy.plain() == {**COPYING, "settings": now, "graphs": [["a" * 64, 0]]}


WRONG: dict[str, list[Any]] = {
    "img_size": [10**12, 0, -1, "32", [32], None],
    "mean": [[0.5], [0.5, 0.5, "x"], 7, None],
    "std": [{"a": 1}, [1, 2, 3, 4]],
    "classes": [7, [1, 2, 3], {"a": 1}],
    "arguments": [[], 7, None, "x"],
    "copying": [
        7,
        [],
        {**COPYING, "layers": "x"},
        {**COPYING, "heads": 10**12},
        {**COPYING, "graphs": [[1, 2, 3]]},
        {**COPYING, "graphs": []},
        {**COPYING, "targets": ["../x"]},
        {**COPYING, "settings": {"tensors": 7}},
        {**COPYING, "settings": 7},
        {k: v for k, v in COPYING.items() if k != "store"},
    ],
}


@pytest.mark.parametrize("name", WRONG)
def test_what_makes_no_sense_is_named(file, tmp_path, name):
    for value in WRONG[name]:
        path = tmp_path / "evil.safetensors"
        save_file(load_file(file), path, {**metadata(file), name: json.dumps(value)})
        with pytest.raises(UserError) as error:
            load_student(path)
        assert f"{path}: damaged: {'attention_copy' if name == 'copying' else name}" in str(error.value), value


def test_what_nests_too_deep_and_a_policy_that_is_none_are_errors(file, tmp_path):
    for name, text in (("arguments", DEEP), ("classes", DEEP), ("evaluation", "rm -rf")):
        path = tmp_path / "evil.safetensors"
        save_file(load_file(file), path, {**metadata(file), name: text})
        with pytest.raises(UserError, match=str(path)):
            load_student(path)
        assert WeightsFile(path).classes == (None if name == "classes" else ABOUT["classes"])
