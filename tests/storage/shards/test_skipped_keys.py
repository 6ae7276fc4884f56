"""Keys that make no sample, links and empty shards: one rule, nothing lost without a count, and webdataset agrees."""

from __future__ import annotations

import io
import tarfile
from typing import TYPE_CHECKING

import pytest
import webdataset

from storage.errors import UserError
from storage.shards.index import ShardIndex, build_index, cached_index, read_samples
from storage.shards.pack import pack
from storage.shards.shard import open_shards
from storage.shards.tar import IMAGES, RULE, require_whole
from tests.storage.helpers import by_us, by_webdataset, packed, picture, sample, samples, write_tar

if TYPE_CHECKING:
    from pathlib import Path

PNG = picture(0)
NO_SAMPLES = {
    "json and txt, as img2dataset leaves them": ([("b.json", b"{}"), ("b.txt", b"a cat")], "found json, txt"),
    "an image of another name": ([("b.input.jpg", PNG)], "found input.jpg"),
    "two such images": ([("b.input.jpg", PNG), ("b.edited.jpg", PNG)], "found edited.jpg, input.jpg"),
    "dots in names": ([("b.1.jpg", PNG), ("b.2.jpg", PNG)], "found 1.jpg, 2.jpg"),
    "two images": ([("b.jpg", PNG), ("b.png", PNG)], "found jpg, png"),
    "a mask alone": ([("b.seg.png", PNG), ("b.cls", b"0")], "found cls, seg.png"),
    "a label that is none": ([("b.cls", b"cat")], "found cls"),
    "what macOS adds to a tar": ([("d/._a.jpg", b"Mac OS X")], "found _a.jpg"),
}


def samples_of_webdataset(path: str) -> list[tuple[str, dict[str, bytes]]]:
    """Those that webdataset yields and that have one image."""
    return [(key, members) for key, members in by_webdataset(path) if sum(kind in IMAGES for kind in members) == 1]


@pytest.mark.parametrize("what", NO_SAMPLES)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_keys_that_make_no_sample_are_refused_by_name_or_left_out_and_counted(tmp_path, what, place) -> None:
    members, message = NO_SAMPLES[what]
    several = [samples(1), samples(1, first=1)]
    several.insert(place, members)
    path = write_tar(tmp_path / "x.tar", [one for members in several for one in members])
    index = build_index(path)
    assert index.keys == ("s000", "s001")
    assert len(index.left_out) == 1
    with pytest.raises(UserError) as error:
        cached_index(path)
    for text in (path, message, RULE, "`pack(", "`precompute(on_decode_error=skip)`"):
        assert text in str(error.value)
    assert cached_index(path, skip=True) == index == ShardIndex.load(index.dump(), "index")
    assert by_us(path) == samples_of_webdataset(path)
    assert [read_samples(path, index, range(i, i + 1))[0].key for i in range(2)] == ["s000", "s001"]
    whole = build_index(write_tar(tmp_path / "whole" / "x.tar", samples(2)))
    assert index.id == whole.id
    made = packed([path], tmp_path / "out", "y.tar", shuffle=False)
    assert by_us(*made.train) == by_webdataset(*made.train) == by_us(path)
    (said,) = made.left_out
    assert said.startswith("1 key(s) make no sample, such as ")
    assert message in said


def with_link(path: Path, name: str, kind: bytes, target: str) -> str:
    """Two samples, and after the first a link in the key `b`, which has a label too."""
    write_tar(path, [*samples(1), ("b.cls", b"1")])
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo(name)
        link.type, link.linkname = kind, target
        tar.addfile(link)
        for name, data in samples(1, first=1):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
@pytest.mark.parametrize("name", ["b.png", "b.json", "c.png"])
def test_links_are_left_out_with_their_keys(tmp_path, kind, name) -> None:
    path = with_link(tmp_path / "x.tar", name, kind, "s000.png")
    index = build_index(path)
    assert index.keys == ("s000", "s001")
    assert any(f"'{name}' is a link" in why for why in index.left_out)
    assert by_us(path) == samples_of_webdataset(path)
    with pytest.raises(UserError, match=r"Pack it again: `pack\("):
        require_whole(path, index.left_out)
    made = packed([path], tmp_path / "out", "y.tar", shuffle=False)
    assert by_us(*made.train) == by_us(path)
    assert made.left_out[0].startswith(f"{len(index.left_out)} key(s) make no sample")


def test_an_index_of_a_shard_without_such_keys_is_spelled_as_it_always_was(tmp_path) -> None:
    index = build_index(write_tar(tmp_path / "x.tar", samples(3)))
    assert b"left_out" not in index.dump()


def test_many_such_keys_are_counted_and_one_is_named(tmp_path) -> None:
    members = [one for i in range(50) for one in [*sample(f"a{i}", i), (f"b{i}.json", b"{}")]]
    path = write_tar(tmp_path / "x.tar", members)
    with pytest.raises(UserError, match=r"key 'b0' needs one image .* \(50 keys make no sample\)"):
        cached_index(path)
    assert packed([path], tmp_path / "out", "y.tar").left_out[0].startswith("50 key(s) make no sample")


def test_a_source_of_nothing_but_such_keys_says_so(tmp_path) -> None:
    path = write_tar(tmp_path / "x.tar", [("cat.1.jpg", PNG), ("dog.1.jpg", PNG)])
    with pytest.raises(UserError, match=r"no samples in the source\n  skipped: 2 key.*first dot"):
        pack(path, str(tmp_path / "y.tar"))
    assert not (tmp_path / "y.tar").exists()


# ---------------------------------------------------------------------------------------------- empty shards


def test_an_empty_tar_is_a_shard_without_samples(tmp_path) -> None:
    empty, full = write_tar(tmp_path / "e.tar", []), write_tar(tmp_path / "f.tar", samples(3))
    index = cached_index(empty)
    assert len(index) == index.blocks == 0
    assert read_samples(empty, index, range(0)) == []
    assert list(webdataset.WebDataset(empty, shardshuffle=False, empty_check=False)) == []
    assert cached_index(empty) == index  # from the cache: its first and last block are none
    said: list[str] = []
    assert [shard.url for shard in open_shards([empty, full], said.append)] == [full]
    assert said == [f"{empty}: no samples in it"]
    made = packed([empty, full], tmp_path / "out", "y.tar", shuffle=False)
    assert by_us(*made.train) == by_us(full)
    for take in (lambda: open_shards(empty), lambda: pack(empty, str(tmp_path / "z.tar"))):
        with pytest.raises(UserError, match="no samples in"):
            take()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "as a tar: empty file"),
        (bytes(512), "closing zero blocks"),
        (bytes(2 << 20), "2,097,152 bytes of zeros and nothing else"),
    ],
)
def test_a_file_that_was_never_written_is_no_empty_shard(tmp_path, data, message) -> None:
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(UserError, match=message):
        build_index(str(tmp_path / "x.tar"))


def test_a_tar_of_other_files_is_no_empty_shard(tmp_path) -> None:
    path = write_tar(tmp_path / "x.tar", [("README", b"x"), ("Makefile", b"x")])
    with pytest.raises(UserError, match="no samples in it; a sample is a key with one image"):
        build_index(path)
