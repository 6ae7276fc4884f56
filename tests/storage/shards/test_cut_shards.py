"""Shards that are cut off, damaged or odd are refused, with the file and the command that repacks."""

from __future__ import annotations

import random
import re
import tarfile
import uuid
from pathlib import Path

import pytest

from storage.errors import DamageError, UserError
from storage.shards.index import build_index, cached_index, read_samples
from storage.shards.pack import pack
from storage.shards.shard import open_shard, require_labels
from tests.storage.helpers import (
    by_us,
    by_webdataset,
    command_in,
    patched,
    picture,
    refusal,
    sample,
    samples,
    write_tar,
)

# ---------------------------------------------------------------------------------------------- cut off, damaged


def test_no_cut_of_a_tar_is_silently_short(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", samples(3))
    data, index = Path(whole).read_bytes(), build_index(whole)
    end = index.starts[-1]
    assert len(data) > end + 2048  # padded beyond the two blocks that close it
    cuts = {cut + d for cut in range(0, len(data), 512) for d in (-1, 0, 1, 100)} | set(range(0, end, 37))
    path = tmp_path / "cut.tar"
    for cut in sorted(cut for cut in cuts if 0 <= cut < len(data)):
        path.write_bytes(data[:cut])
        if cut < end + 1024:
            refusal(str(path))
        else:
            assert build_index(str(path)).keys == index.keys


def test_reading_a_tar_that_was_cut_since_it_was_indexed_is_damage(tmp_path):
    path = Path(write_tar(tmp_path / "x.tar", samples(6)))
    index, data = build_index(str(path)), path.read_bytes()
    for cut in range(0, index.starts[-1], 256):
        path.write_bytes(data[:cut])
        with pytest.raises(DamageError, match="truncated"):
            read_samples(str(path), index, range(6))
    path.unlink()
    with pytest.raises(DamageError, match="missing"):
        read_samples(str(path), index, range(6))


@pytest.mark.parametrize("left", [0, 512, 1023])
def test_missing_closing_blocks_are_told_with_the_command_that_repacks(tmp_path, monkeypatch, left):
    path = Path(write_tar(tmp_path / "x.tar", samples(3)))
    end = build_index(str(path)).starts[-1]
    path.write_bytes(path.read_bytes()[: end + left])
    message = refusal(str(path))
    assert "closing zero blocks" in message
    monkeypatch.chdir(tmp_path)
    made = pack(*command_in(message), shuffle=False).train
    assert by_us(*made) == by_webdataset(*made) == by_webdataset(str(path))


def test_data_after_the_closing_blocks_is_refused(tmp_path):
    one, two = (Path(write_tar(tmp_path / f"{i}.tar", samples(2, first=i * 2))) for i in range(2))
    both = tmp_path / "both.tar"
    both.write_bytes(one.read_bytes() + two.read_bytes())
    assert "damaged after byte" in refusal(str(both))
    one.write_bytes(one.read_bytes() + b"x")
    assert "damaged after byte" in refusal(str(one))


def test_damaged_headers_end_in_a_clear_error_or_the_same_samples(tmp_path):
    good = write_tar(tmp_path / "good.tar", samples(3))
    data = Path(good).read_bytes()
    heads = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
    path = tmp_path / "bad.tar"
    chance = random.Random(0)
    index = build_index(good)
    for _ in range(400):
        bad = bytearray(data)
        head = chance.choice(heads)
        for _ in range(chance.randint(1, 3)):
            at = chance.choice([chance.randrange(512), 124, 125, 127, 134, 156])
            bad[head + at] = chance.choice([chance.randrange(256), 0x80, 0xFF, *b"0x7gSLK1"])
        bad[head + 148 : head + 156] = b" " * 8
        bad[head + 148 : head + 156] = b"%06o\0 " % sum(bad[head : head + 512])
        path.write_bytes(bad)
        for look in (build_index, lambda url: read_samples(url, index, range(3))):
            try:
                look(str(path))
            except UserError as error:
                assert str(path) in str(error)  # noqa: PT017


@pytest.mark.parametrize("size", [b"\x80" + b"\x7f" * 11, b"\xff" * 11 + b"\x00", b"\x80\0\0\0\0\x10\0\0\0\0\0\0"])
def test_a_member_that_claims_an_impossible_size_is_refused(tmp_path, size):
    path = Path(write_tar(tmp_path / "x.tar", samples(2)))
    data = bytearray(path.read_bytes())
    data[512 * 2 + 124 : 512 * 2 + 136] = size
    path.write_bytes(data)
    patched(str(path), b"ustar", b"ustar")
    refusal(str(path))


# ---------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("mode", "kind", "end"), [("w:gz", "gzip", "gz"), ("w:bz2", "bzip2", "bz2"), ("w:xz", "xz", "xz")]
)
@pytest.mark.parametrize("name", ["x.tar.{end}", "my shard.tar"])
def test_compressed_tars_are_refused_with_the_command_that_repacks(tmp_path, monkeypatch, mode, kind, end, name):
    path = write_tar(tmp_path / name.format(end=end), samples(5), mode=mode)
    message = refusal(path)
    assert kind in message
    monkeypatch.chdir(tmp_path)
    made = pack(*command_in(message), shuffle=False).train
    assert by_us(*made) == by_webdataset(path)


def test_a_zstd_tar_is_refused(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(2000))
    assert "zstd" in refusal(str(tmp_path / "x.tar"))


def apart():
    members = samples(3)
    return [m for m in members if m[0].endswith("png")] + [m for m in members if m[0].endswith("cls")]


def test_members_of_one_key_apart_are_refused_with_the_command_that_repacks(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "x.tar", apart())
    message = refusal(path)
    assert "'s000'" in message
    monkeypatch.chdir(tmp_path)
    made = pack(*command_in(message), shuffle=False).train
    assert by_us(*made) == by_us(write_tar(tmp_path / "sorted.tar", samples(3)))


PNG = picture(0)
REFUSED = {
    "a key twice": ([*sample("a", 0), *sample("b", 1), *sample("a", 2)], "key 'a' appears twice"),
    "an extension twice": ([("a.png", PNG), ("a.png", PNG)], "key 'a' has two members"),
    "an extension twice in capitals": ([("a.png", PNG), ("a.PNG", PNG)], "key 'a' has two members"),
    "a name that climbs": ([("../x.png", PNG)], "'../x.png' leads outside"),
    "a name that climbs within": ([("a/../../x.png", PNG)], "leads outside"),
    "an absolute name": ([("/abs.png", PNG)], "'/abs.png' leads outside"),
    "no image": ([("a.cls", b"0")], "key 'a' needs one image"),
    "no image that we read": ([("a.cls", b"0"), ("a.gif", b"GIF89a")], "found cls, gif"),
    "two images": ([("a.jpg", PNG), ("a.png", PNG)], "key 'a' needs one image .*found jpg, png"),
    "a label that is no number": ([("a.cls", b"x1"), ("a.png", PNG)], "key 'a': the label is b'x1'"),
    "a negative label": ([("a.cls", b"-1"), ("a.png", PNG)], "the label is b'-1'"),
    "a fraction for a label": ([("a.cls", b"1.5"), ("a.png", PNG)], "the label is b'1.5'"),
    "an empty label": ([("a.cls", b""), ("a.png", PNG)], "the label is b''"),
    "a label in other digits": ([("a.cls", "١".encode()), ("a.png", PNG)], "the label is"),
    "no sample": ([("README", b"x")], "no samples"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(tmp_path, what):
    members, message = REFUSED[what]
    path = write_tar(tmp_path / "x.tar", members)
    assert re.search(message, refusal(path))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    path = tmp_path / "x.tar"
    write_tar(path, sample("a", 0))
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("b.png")
        info.type, info.linkname = kind, "a.png"
        tar.addfile(info)
    assert "'b.png' is a link" in refusal(str(path))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
def test_names_that_are_not_utf8_are_refused(tmp_path, form):
    path = write_tar(tmp_path / "x.tar", [*sample("a", 0), *sample("ü", 1)], format=form, encoding="latin-1")
    assert "UTF-8" in refusal(path)


def test_labels_may_have_white_space_around_them(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.cls", b" 12\r\n"), ("a.png", PNG)])
    assert build_index(path).labels == (12,)


@pytest.mark.parametrize("content", [b"", b"hello", b"\0" * 511, PNG * 20])
def test_files_that_are_no_tars_are_refused(tmp_path, content):
    (tmp_path / "x.tar").write_bytes(content)
    refusal(str(tmp_path / "x.tar"))


def test_a_file_that_is_not_there_is_refused(tmp_path):
    refusal(str(tmp_path / "x.tar"))
    refusal(f"memory://{uuid.uuid4().hex}/x.tar")
    with pytest.raises(UserError, match=r"x\.tar"):
        cached_index(str(tmp_path / "x.tar"))


def test_losses_that_need_labels_are_told_the_first_key_without(tmp_path):
    path = write_tar(tmp_path / "x.tar", [*sample("a", 0), *sample("b", 1, None), *sample("c", 2, None)])
    shard = open_shard(path)
    assert not shard.summary.labelled
    with pytest.raises(UserError, match=r"x\.tar: key 'b' has no label"):
        require_labels(shard)
    full = write_tar(tmp_path / "y.tar", samples(2))
    require_labels(open_shard(full))
