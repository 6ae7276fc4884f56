"""A file is written whole or not at all, and nothing is left beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from storage.objects.atomic import atomic_write, temporary_path

if TYPE_CHECKING:
    from pathlib import Path


def test_a_file_is_there_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"new")
        assert (temporary, path.read_bytes()) == (temporary_path(path), b"old")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a.bin", b"new")]


def test_after_an_error_the_old_one_is_there_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def fail() -> None:
        with atomic_write(path) as temporary:
            temporary.write_bytes(b"half")
            raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        fail()
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a.bin", b"old")]


def test_what_a_kill_left_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    temporary_path(path).write_bytes(b"half of a longer one")
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.write(b"new")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a.bin", b"new")]
