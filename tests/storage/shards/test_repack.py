"""Packing shards again, and what pack refuses: nothing is lost or overwritten, and no half shard is left."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from storage.errors import UserError
from storage.shards.index import build_index, cached_index
from tests.storage.helpers import by_us, by_webdataset, class_folders, keys_in, packed, sample, samples, write_tar

# ---------------------------------------------------------------------------------------------- repacking


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_tars_are_repacked(tmp_path, mode):
    path = write_tar(tmp_path / "x.tar.z", samples(9), mode=mode)
    made = packed([path], tmp_path / "out", shuffle=False)
    assert by_us(*made.train) == by_webdataset(path) == by_webdataset(*made.train)


def test_a_compressed_tar_that_is_cut_off_is_refused(tmp_path):
    path = Path(write_tar(tmp_path / "x.tar.gz", samples(9), mode="w:gz"))
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"x\.tar\.gz: cannot be decompressed"):
        packed([str(path)], tmp_path / "out")
    path.write_bytes(gzip.compress(b"no tar" * 200))
    with pytest.raises(UserError, match=r"x\.tar\.gz: "):
        packed([str(path)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_zstd_is_refused_with_advice(tmp_path):
    (tmp_path / "x.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(100))
    with pytest.raises(UserError, match=r"Decompress it first: zstd -d .*x\.tar\.zst"):
        packed([str(tmp_path / "x.tar.zst")], tmp_path / "out")


def test_members_that_stand_apart_are_brought_together(tmp_path):
    members = samples(5)
    apart = [m for m in members if m[0].endswith("cls")] + [m for m in members if m[0].endswith("png")]
    made = packed([write_tar(tmp_path / "x.tar", apart)], tmp_path / "out", shuffle=False)
    assert by_us(*made.train) == by_us(write_tar(tmp_path / "y.tar", members))


def test_a_folder_of_tars_is_packed_too(tmp_path):
    shards = [write_tar(tmp_path / "my [x] {y}" / f"{i}.tar", samples(3, first=3 * i)) for i in range(2)]
    made = packed(tmp_path / "my [x] {y}", tmp_path / "out", shuffle=False)
    assert keys_in(*made.train) == keys_in(*shards)


def test_a_folder_beside_other_sources_is_refused_or_packed_with_them(tmp_path):
    shards = [write_tar(tmp_path / f"{i}" / "x.tar", samples(3, first=3 * i)) for i in range(2)]
    try:
        made = packed([str(tmp_path / "0"), shards[1]], tmp_path / "out", shuffle=False)
    except UserError as error:
        assert "folder" in str(error)  # noqa: PT017
    else:
        assert keys_in(*made.train) == keys_in(*shards)


def test_two_tars_in_one_file_are_not_silently_one(tmp_path):
    one, two = (Path(write_tar(tmp_path / f"{i}.tar", samples(2, first=i * 2))) for i in range(2))
    one.write_bytes(one.read_bytes() + two.read_bytes())
    with pytest.raises(UserError, match=r"0\.tar: damaged after byte"):
        packed([str(one)], tmp_path / "out")


def test_a_damaged_header_does_not_end_a_source_silently(tmp_path):
    path = Path(write_tar(tmp_path / "x.tar", samples(4)))
    data = bytearray(path.read_bytes())
    data[build_index(str(path)).starts[2] + 150] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"x\.tar: damaged after byte"):
        packed([str(path)], tmp_path / "out")


# ---------------------------------------------------------------------------------------------- refused


def test_shards_are_never_overwritten(tmp_path, animals):
    made = packed(animals, tmp_path, val_fraction=0.2)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for there in [*made.train, *made.val]:
        name = Path(there).name
        with pytest.raises(UserError, match=rf"{name}: already exists"):
            packed(animals, tmp_path, val_fraction=0.2, seed=1)
        (tmp_path / name).unlink()
        del before[tmp_path / name]
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_class_list_beside_the_new_shards_is_refused(tmp_path, animals):
    packed(animals, tmp_path / "out")
    other = class_folders(tmp_path / "f", {"dog": 2, "cat": 2})
    for source in (other, write_tar(tmp_path / "no classes here" / "x.tar", samples(2))):
        with pytest.raises(UserError, match=r"classes\.json: already exists"):
            packed([str(source)], tmp_path / "out", "y.tar")
    assert packed(animals, tmp_path / "out", "z-{0..1}.tar").samples == {"train": 31}  # the same list is no conflict
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["cat", "dog", "eel"]


def test_a_failure_leaves_no_half_shard(tmp_path):
    path = write_tar(tmp_path / "x.tar", [*sample("a", 0), *sample("b", 1), *sample("b", 1)])
    with pytest.raises(UserError, match=r"x\.tar: key 'b' has two members of the same kind"):
        packed([path], tmp_path / "out", "y.tar")
    assert not list((tmp_path / "out").glob("*"))
    assert not list((tmp_path / "out").glob(".*"))


def test_a_label_that_is_none_names_the_key_of_the_source(tmp_path):
    path = write_tar(tmp_path / "x.tar", sample("a", 0, "cat"))
    with pytest.raises(UserError, match=r"x\.tar: key 'a': the label is b'cat'"):
        packed([path], tmp_path / "out")


def test_folders_without_images_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images found"):
        packed(tmp_path / "empty", tmp_path / "out")
    folder = class_folders(tmp_path / "f", {"a": 2, "b": 0})
    with pytest.raises(UserError, match=r"f/b: a class folder without images"):
        packed(folder, tmp_path / "out")
    with pytest.raises(UserError, match="no such folder, list or shard"):
        packed(tmp_path / "nowhere", tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("x.tgz", {}, "NAME.tar"),
        ("x.tar", {"fraction": 0}, "`fraction=0`"),
        ("x.tar", {"fraction": 1.01}, "`fraction=1.01`"),
        ("x.tar", {"val_fraction": 1}, "`val_fraction=1`"),
        ("x.tar", {"val_fraction": -0.1}, "`val_fraction=-0.1`"),
        ("x-{0..2}.tar", {"per_shard": 10}, "Widen the braces"),
        ("x.tar", {"per_shard": 0}, "`per_shard=0`"),
        ("x.tar", {"per_shard": -1}, "`per_shard=-1`"),
        ("x-{00..99}.tar", {}, "cannot fill 100 shards"),
        ("x-{0..2.tar", {}, "braces"),
        ("x-{0,0}.tar", {}, "twice"),
    ],
)
def test_refused(tmp_path, animals, name, settings, message):
    with pytest.raises(UserError, match=message):
        packed(animals, tmp_path / "out", name, **settings)
    assert not (tmp_path / "out").exists()


def test_what_was_packed_can_be_packed_again(tmp_path, animals):
    once = packed(animals, tmp_path / "a")
    again = packed(once.train, tmp_path / "b", "y-{0..2}.tar", seed=5)
    assert sorted(by_us(*again.train)) == sorted(by_us(*once.train))
    assert again.classes == once.classes
    assert cached_index(again.train[0]) == build_index(again.train[0])
