"""Files of weights: what is read of them is read once, and what is hostile is refused."""

from __future__ import annotations

import hashlib
import json
import struct
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from storage.errors import UserError
from storage.objects.weights_file import WeightsFile
from tests.opens import counted_opens

if TYPE_CHECKING:
    from pathlib import Path

STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
NOTES = {"classes": '["cat", "dog"]', "mean": "[0.1, 0.2, 0.3]", "std": "[1, 2, 3]", "copying": '{"layers": [1]}'}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(STATE, tmp_path / "w.safetensors", NOTES)
    return tmp_path / "w.safetensors"


def test_it_says_what_the_library_says(path: Path) -> None:
    file = WeightsFile(path)
    assert file.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (file.classes, file.copies_attention) == (("cat", "dog"), True)
    assert file.normalization == {"mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 3.0)}
    assert file.metadata == NOTES
    state = file.weights().state
    assert state.keys() == STATE.keys()
    assert all(torch.equal(state[name], STATE[name]) and state[name].dtype == STATE[name].dtype for name in STATE)


def test_everything_about_it_takes_one_opening_for_the_digest_and_one_for_the_header(path: Path) -> None:
    with counted_opens(path.parent) as library:
        load_file(path)
    with counted_opens(path.parent) as ours:
        file = WeightsFile(path)
        file.weights()
        for _ in range(2):
            assert (file.classes, file.copies_attention, len(file.normalization)) == (("cat", "dog"), True, 2)
    assert ours == library
    with counted_opens(path.parent) as ours:
        file = WeightsFile(path)
        for _ in range(2):
            assert len(file.digest) == 64
            assert (file.classes, file.copies_attention, len(file.normalization)) == (("cat", "dog"), True, 2)
    assert ours == {path.name: 2}


def header(content: Any, length: int | None = None) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


TENSOR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        header({"__metadata__": {"classes": '["a"]'}}, length=2**63),
        header({"__metadata__": {"classes": '["a"]'}}, length=2**64 - 1),
        header({"__metadata__": {"classes": '["a"]'}}, length=1000),
        header({"__metadata__": {"classes": '["a"]'}}, length=200_000_000) + b" " * 1000,
        header(b"[" * 100_000),
        header(b'{"__metadata__":' + b'{"a":' * 100_000),
        header({"__metadata__": {"classes": ["a"]}}),
        header({"__metadata__": ["a"]}),
        header({"__metadata__": {"classes": '["a"]'}, "x": TENSOR}),
        header({"__metadata__": {"classes": '["a"]'}, "x": {**TENSOR, "data_offsets": [0, 2**62]}}) + b"\0" * 4,
        header({"__metadata__": {"classes": '["a"]'}, "x": {**TENSOR, "shape": [2**62, 4]}}) + b"\0" * 4,
        header(b"\xff\xfe{}"),
    ],
)
def test_a_header_that_is_none_gives_nothing_and_no_tensors(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "evil.safetensors"
    path.write_bytes(data)
    file = WeightsFile(path)
    assert (file.metadata, file.classes, file.normalization, file.copies_attention) == ({}, None, {}, False)
    with pytest.raises(UserError, match=r"evil\.safetensors: cannot be read as weights"):
        file.weights()


@pytest.mark.parametrize("text", ["nonsense", "[" * 100_000, "NaN", "1e999", '"x"', "[1, 2]", '[1, 2, "3"]', "null"])
def test_notes_that_make_no_sense_are_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "w.safetensors"
    save_file(STATE, path, dict.fromkeys(("classes", "mean", "std"), text))
    file = WeightsFile(path)
    assert (file.classes, file.normalization) == (None, {})


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for name in ("none.safetensors", "none.pth"):
        file = WeightsFile(tmp_path / name)
        assert file.metadata == {}
        with pytest.raises(UserError, match=rf"`weights=.*{name}`: cannot be read: No such file"):
            _ = file.digest
        with pytest.raises(UserError, match=rf"{name}: cannot be read as weights"):
            file.weights()
