"""Names of shards, and the classes beside them: patterns, nearest names, folders that are none."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from pipeline.messages import as_flags
from storage.errors import UserError
from storage.shards.classes import classes_of
from storage.shards.pack import pack
from storage.shards.patterns import expand
from tests.storage.helpers import by_us, class_folders, command_in, samples, write_tar

# ---------------------------------------------------------------------------------------------- names of shards


@pytest.fixture
def three(tmp_path):
    """Three tars in a folder."""
    return [write_tar(tmp_path / "d" / f"train-{i:06d}.tar", samples(1, first=i)) for i in range(3)]


def test_braces_stars_and_colons_name_the_same_shards(three):
    folder = str(Path(three[0]).parent)
    assert expand(f"{folder}/train-{{000000..000002}}.tar") == three
    assert expand(f"{folder}/*.tar") == three
    assert expand("::".join(three)) == three
    assert expand([three[0], f"{folder}/train-00000[12].tar"]) == three
    assert expand(f"{three[2]}::{three[0]}") == [three[2], three[0]]


def test_a_missing_shard_names_the_nearest_one(three):
    folder = str(Path(three[0]).parent)
    with pytest.raises(UserError, match=r"trian-000001\.tar: no such shard.*\n  Did you mean 'train-000001\.tar'"):
        expand(f"{folder}/trian-000001.tar")
    with pytest.raises(
        UserError, match=r"-000003\.tar: no such shard .*\{000000\.\.000003\}.*\n  3 of its 4 names exist"
    ):
        expand(f"{folder}/train-{{000000..000003}}.tar")
    with pytest.raises(UserError, match="no tars in"):
        expand(f"{folder}/deeper/x.tar")
    with pytest.raises(UserError, match=r"val-\*\.tar: no file matches"):
        expand(f"{folder}/val-*.tar")


@pytest.mark.parametrize("pattern", ["{d}/train-{{000000..000002.tar", "{d}/train-000000..2}}.tar"])
def test_braces_that_do_not_close_are_a_clear_error(three, pattern):
    with pytest.raises(UserError):
        expand(pattern.format(d=Path(three[0]).parent))


def test_the_same_shard_twice_is_refused(three):
    with pytest.raises(UserError, match=r"train-000001\.tar: the same shard is named twice"):
        expand([*three, three[1]])
    folder, _, name = three[1].rpartition("/")
    with pytest.raises(UserError, match="named twice"):
        expand(f"{three[1]}::{folder}/./{name}")


def test_no_shards_are_an_error():
    with pytest.raises(UserError, match="no shards"):
        expand([])


@pytest.mark.parametrize("name", ["photos", "my photos", "it's"])
def test_a_folder_of_class_folders_answers_with_the_command_that_packs_it(tmp_path, monkeypatch, name):
    folder = class_folders(tmp_path / name, {"cat": 20, "dog": 10})
    with pytest.raises(UserError) as error:
        expand(str(folder))
    message = as_flags(str(error.value))
    assert "30 images" in message
    monkeypatch.chdir(tmp_path)
    source, out, flag, part = command_in(message)
    assert flag == "--val-fraction"
    made = pack(source, out, val_fraction=float(part))
    words = shlex.split(message.splitlines()[-1].replace(",", " "))
    train, val = (words[words.index(name) + 1] for name in ("--shards", "--val"))
    assert expand(train) == made.train
    assert expand(val) == made.val
    assert made.samples == {"train": 27, "val": 3}
    assert len(by_us(*made.train, *made.val)) == 30


def test_a_folder_of_tars_answers_with_the_pattern_that_names_them(three):
    with pytest.raises(UserError) as error:
        expand(str(Path(three[0]).parent))
    message = as_flags(str(error.value))
    (pattern,) = shlex.split(message[message.index("--shards") :])[1:]
    assert expand(pattern) == three


def test_an_empty_folder_is_said_to_be_one(tmp_path):
    with pytest.raises(UserError, match="without tars and without images"):
        expand(str(tmp_path))


# ---------------------------------------------------------------------------------------------- classes


def test_classes_are_read_beside_the_shards(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "classes.json").write_text('["x", "y"]')
    assert classes_of([str(tmp_path / "a/1.tar"), str(tmp_path / "b/1.tar"), str(tmp_path / "c/1.tar")]) == ["x", "y"]
    assert classes_of([str(tmp_path / "c" / "1.tar")]) is None


def test_class_lists_that_differ_are_refused(tmp_path):
    for folder, classes in (("a", ["x", "y"]), ("b", ["y", "x"])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "classes.json").write_text(json.dumps(classes))
    with pytest.raises(UserError, match=r"differ: .*a/classes\.json.*b/classes\.json"):
        classes_of([str(tmp_path / "a" / "1.tar"), str(tmp_path / "b" / "1.tar")])


@pytest.mark.parametrize("text", ["", "{", '{"x": 0}', "[]", '["x", "x"]', "[1, 2]", '[["x"]]', "null", "\udcff"])
def test_what_is_no_list_of_classes_is_refused(tmp_path, text):
    (tmp_path / "classes.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"classes\.json"):
        classes_of([str(tmp_path / "1.tar")])
