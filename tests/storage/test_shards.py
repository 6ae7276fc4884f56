"""Shards: what is read is what webdataset reads, whatever is asked for; everything else is refused by name."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import shlex
import tarfile
import uuid
from pathlib import Path

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from storage import shards
from storage.errors import DamageError, IdentityError, UserError
from storage.pack import pack
from storage.shards import (
    ShardIndex,
    build_index,
    cached_index,
    classes_of,
    differences,
    expand,
    read_samples,
    require_labels,
)
from storage.tars import split_name, stem_of
from storage.testing import synthetic_shards
from tests.storage.helpers import by_us, by_webdataset, class_folders, picture, sample, samples, write_tar


def command_in(message: str) -> list[str]:
    """The arguments of the `pipeline pack` command that a message tells."""
    line = next(line for line in message.splitlines() if "pipeline pack" in line)
    return shlex.split(line[line.index("pipeline pack") :])[2:]


def patched(path: str, old: bytes, new: bytes) -> None:
    """Replace bytes of a tar by as many others, and mend the checksums of all headers."""
    assert len(old) == len(new)
    data = bytearray(Path(path).read_bytes())
    assert old in data
    data = bytearray(data.replace(old, new))
    for at in range(0, len(data), 512):
        if data[at + 257 : at + 262] == b"ustar":
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    Path(path).write_bytes(data)


def refusal(path: str) -> str:
    """The message with which a tar is refused; it must name the file."""
    with pytest.raises(UserError) as error:
        build_index(path)
    assert path in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def long_shard(tmp_path_factory):
    """200 samples: four blocks, the last of 8."""
    return write_tar(tmp_path_factory.mktemp("long") / "long.tar", samples(200))


# ---------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_webdataset_yields_what_we_read(tmp_path, kind):
    paths = synthetic_shards(tmp_path, shards=2, samples=70, size=(8, 8), kind=kind)
    ours = by_us(*paths)
    assert len(ours) == 140
    assert ours == by_webdataset(*paths)


def test_webdataset_yields_what_we_read_without_labels(tmp_path):
    paths = synthetic_shards(tmp_path, shards=1, samples=3, size=(8, 8), labels=False)
    assert by_us(*paths) == by_webdataset(*paths)
    assert build_index(paths[0]).labels == (None, None, None)


def test_json_members_come_along(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.json", b'{"licence": "none"}'), *sample("a", 0), *sample("b", 1)])
    assert by_us(path) == by_webdataset(path)
    assert read_samples(path, build_index(path), range(1))[0].json == b'{"licence": "none"}'


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_of_tar_is_read_by_ranges(tmp_path, form):
    long = "folder/" * 12 + "x" * (10 if form == tarfile.USTAR_FORMAT else 180)
    members = [m for i in range(5) for m in sample(f"{long}{i}ü", i)]
    path = write_tar(tmp_path / "x.tar", members, format=form)
    index = build_index(path)
    assert by_us(path) == by_webdataset(path)
    assert [read_samples(path, index, range(i, i + 1))[0].key for i in range(5)] == list(index.keys)


def test_any_range_is_a_part_of_the_whole(long_shard):
    index = build_index(long_shard)
    whole = read_samples(long_shard, index, range(200))
    for start, stop in itertools.combinations([0, 1, 2, 63, 64, 65, 128, 191, 192, 199, 200], 2):
        assert read_samples(long_shard, index, range(start, stop)) == whole[start:stop]


def test_blocks_cut_the_samples_in_order(long_shard):
    index = build_index(long_shard)
    assert [i for number in range(index.blocks) for i in index.block(number)] == list(range(200))
    assert [len(index.block(number)) for number in range(index.blocks)] == [64, 64, 64, 8]


def test_summary_holds_the_digests_of_the_first_and_last_block(long_shard):
    index, data = build_index(long_shard), Path(long_shard).read_bytes()
    for (start, stop, digest), block in zip([index.summary.first, index.summary.last], [0, 3], strict=True):
        assert (start, stop) == (index.starts[block * 64], index.starts[index.block(block).stop])
        assert hashlib.sha256(data[start:stop]).hexdigest() == digest
    assert index.summary.bytes == len(data)


def test_an_index_survives_its_record(long_shard):
    index = build_index(long_shard)
    assert ShardIndex.load(index.dump(), "index") == index


def test_remote_shards_are_read_like_local_ones(long_shard):
    url = f"memory://{uuid.uuid4().hex}/long.tar"
    fsspec.filesystem("memory").pipe_file(url, Path(long_shard).read_bytes())
    index = build_index(url)
    assert index == build_index(long_shard) == cached_index(url)
    assert read_samples(url, index, range(60, 70)) == read_samples(long_shard, index, range(60, 70))
    assert expand([url]) == [url]


def test_a_file_url_is_a_local_file(long_shard):
    url = f"file://{long_shard}"
    assert build_index(url) == build_index(long_shard)
    assert cached_index(url) == build_index(long_shard)
    assert expand(url) == [long_shard]


# ---------------------------------------------------------------------------------------------- keys


@given(st.text("aB./_-\n", max_size=12))
@settings(max_examples=200, deadline=None)
def test_keys_end_where_webdataset_ends_them(name):
    key, kind = base_plus_ext(name)
    assert split_name(name) == (None if key is None else (key, kind.lower()))


def test_names_with_dots_make_the_samples_that_webdataset_makes(tmp_path):
    names = ["a.jpg", "a.b.jpg", "a.cls", "d.e/f.PNG", "d.e/f.seg.png", "d.e/g.webp", "h.tar.jpeg", "h.jpeg"]
    path = write_tar(tmp_path / "x.tar", [(name, b"1") for name in names])
    theirs = by_webdataset(path)
    index = build_index(path)
    assert list(index.keys) == [key for key, _ in theirs] == ["a", "d.e/f", "d.e/g", "h"]
    for found, (_, members) in zip(read_samples(path, index, range(4)), theirs, strict=True):
        assert members[found.kind] == found.image


@pytest.mark.parametrize(
    "name",
    ["README", "folder/README", "__meta__", "__index__/x.png", "__a.b__", "__a__", "__a/b.c__", ".hidden", "a/.b"],
)
def test_what_webdataset_passes_over_we_pass_over(tmp_path, name):
    extra = (name, picture(9))
    path = write_tar(tmp_path / "x.tar", [extra, *sample("a", 0), extra, *sample("b", 1), extra])
    theirs = [(key, sorted(members)) for key, members in by_webdataset(path)]
    try:
        ours = [(key, sorted(members)) for key, members in by_us(path)]
    except UserError:  # a member that counts: a sample without an image
        assert len(theirs) > 2
    else:
        assert ours == theirs


def test_folders_in_a_tar_are_passed_over(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("d", "d/e", "z"):
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE
            tar.addfile(info)
    write_tar(path, [*sample("d/a", 0), *sample("d/b", 1)], mode="a")
    assert build_index(str(path)).keys == ("d/a", "d/b")
    assert by_us(str(path)) == by_webdataset(str(path))


# ---------------------------------------------------------------------------------------------- identity


def test_the_id_is_of_keys_and_images_alone(tmp_path):
    one = build_index(write_tar(tmp_path / "a" / "x.tar", samples(5)))
    relabelled = [(name, b"9" if name.endswith("cls") else data) for name, data in samples(5)]
    for number, members in enumerate([samples(5), relabelled, [("README", b"x"), *samples(5)]]):
        other = build_index(write_tar(tmp_path / str(number) / "x.tar", members, mtime=1234567))
        assert one.summary.first != other.summary.first
        assert one.id == other.id
    assert one.id.rpartition("-")[0] == "x"


def test_other_content_or_order_or_name_is_another_id(tmp_path):
    members = samples(4)
    same = build_index(write_tar(tmp_path / "x.tar", members)).id
    others = [
        members[2:] + members[:2],
        members[:-2],
        [*members[:-2], *sample("s003", 99)],
        [*members[:-2], *sample("s004", 3)],
    ]
    ids = [build_index(write_tar(tmp_path / str(i) / "x.tar", other)).id for i, other in enumerate(others)]
    ids.append(build_index(write_tar(tmp_path / "y.tar", members)).id)
    assert len({same, *ids}) == 6


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("a/x-0001.tar", "x-0001"), ("x.tar.gz", "x"), ("x.tgz", "x"), ("s3://b/ü.v1.tar", "__v1"),
        ("x", "x"), ("a" * 99 + ".tar", "a" * 80),
    ],
)  # fmt: skip
def test_stems_have_no_other_signs(name, stem):
    assert stem_of(name) == stem


def changes():
    middle = "s100"
    return [
        ("image digest", picture(100), picture(100)[:-20] + b"!" * 20),
        ("key of sample 100", f"{middle}.".encode(), b"S100."),
    ]


@pytest.mark.parametrize(("field", "old", "new"), changes())
def test_a_change_in_a_middle_block_is_found_when_it_is_read(tmp_path, field, old, new):
    path = write_tar(tmp_path / "x.tar", samples(200))
    index = build_index(path)
    patched(path, old, new)
    assert not differences(path, index.summary)  # size, first and last block are what they were
    with pytest.raises(IdentityError) as error:
        read_samples(path, index, index.block(1))
    assert error.value.field == field
    assert path in str(error.value)
    after = build_index(path)
    column = "keys" if "key" in field else "digests"
    assert (error.value.expected, error.value.found) == (getattr(index, column)[100], getattr(after, column)[100])
    for number in (0, 2, 3):
        assert len(read_samples(path, index, index.block(number))) == len(index.block(number))


def test_a_changed_label_in_a_middle_block_is_found_when_it_is_read(tmp_path):
    path = write_tar(tmp_path / "x.tar", samples(200))
    index = build_index(path)
    write_tar(Path(path), [("s100.cls", b"7") if name == "s100.cls" else (name, data) for name, data in samples(200)])
    assert not differences(path, index.summary)
    with pytest.raises(IdentityError) as error:
        read_samples(path, index, index.block(1))
    assert (error.value.field, error.value.expected, error.value.found) == ("label", 100 % 3, 7)
    assert "s100" in error.value.where


def test_a_sample_that_is_gone_from_a_range_is_found(tmp_path):
    path = write_tar(tmp_path / "x.tar", samples(6))
    index = build_index(path)
    data = bytearray(Path(path).read_bytes())
    data[index.starts[4] + 150] ^= 1  # a header that is none ends a tar, silently for tarfile
    Path(path).write_bytes(data)
    with pytest.raises(IdentityError) as error:
        read_samples(path, index, range(6))
    assert (error.value.field, error.value.expected, error.value.found) == ("samples", 6, 4)


def test_a_shard_with_one_more_sample_is_another_one_even_where_its_tar_is_as_large(tmp_path):
    (short,) = synthetic_shards(tmp_path / "short", shards=1, samples=6)
    (long,) = synthetic_shards(tmp_path / "long", shards=1, samples=7)
    assert Path(short).stat().st_size == Path(long).stat().st_size  # tars are padded
    assert differences(long, build_index(short).summary) == [("samples", 6, "more")]
    assert differences(short, build_index(short).summary) == []


def test_differences_name_the_field(tmp_path):
    path = write_tar(tmp_path / "x.tar", samples(130))
    known = build_index(path).summary
    assert differences(path, known) == []
    patched(path, b"s000.", b"S000.")
    assert [field for field, *_ in differences(path, known)] == ["sha256 of the first block"]
    patched(path, b"s129.", b"S129.")
    assert [field for field, *_ in differences(path, known)] == [
        "sha256 of the first block",
        "sha256 of the last block",
    ]
    write_tar(Path(path), samples(160))
    assert [field for field, *_ in differences(path, known)] == ["size in bytes"]


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
    with pytest.raises(DamageError, match="gone"):
        read_samples(str(path), index, range(6))


@pytest.mark.parametrize("left", [0, 512, 1023])
def test_missing_closing_blocks_are_told_with_the_command_that_repacks(tmp_path, monkeypatch, left):
    path = Path(write_tar(tmp_path / "x.tar", samples(3)))
    end = build_index(str(path)).starts[-1]
    path.write_bytes(path.read_bytes()[: end + left])
    message = refusal(str(path))
    assert "closing zero blocks" in message
    monkeypatch.chdir(tmp_path)
    made = pack(*command_in(message), shuffle=False)["train"]
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
    made = pack(*command_in(message), shuffle=False)["train"]
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
    made = pack(*command_in(message), shuffle=False)["train"]
    assert by_us(*made) == by_us(write_tar(tmp_path / "sorted.tar", samples(3)))


PNG = picture(0)
REFUSED = {
    "a key twice": ([*sample("a", 0), *sample("b", 1), *sample("a", 2)], "key 'a' is there twice"),
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
    "nothing": ([], "no samples"),
    "no sample": ([("README", b"x")], "no samples"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(tmp_path, what):
    members, message = REFUSED[what]
    path = write_tar(tmp_path / "x.tar", members)
    with pytest.raises(UserError, match=message):
        build_index(path)
    refusal(path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    path = tmp_path / "x.tar"
    write_tar(path, sample("a", 0))
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("b.png")
        info.type, info.linkname = kind, "a.png"
        tar.addfile(info)
    assert "'b.png' is a link or a device" in refusal(str(path))


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
    index = build_index(path)
    assert not index.summary.labelled
    with pytest.raises(UserError, match=r"x\.tar: key 'b' has no label"):
        require_labels(path, index)
    full = write_tar(tmp_path / "y.tar", samples(2))
    require_labels(full, build_index(full))


# ---------------------------------------------------------------------------------------------- the cache


def test_the_cached_index_is_used_until_the_file_changes(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "x.tar", samples(3))
    built = []
    monkeypatch.setattr(shards, "build_index", lambda url: built.append(url) or build_index(url))
    first = cached_index(path)
    assert cached_index(path) == first == build_index(path)
    assert built == [path]
    patched(path, b"s002.", b"S002.")
    assert cached_index(path).keys == ("s000", "s001", "S002")
    assert built == [path, path]
    cached_index(path)
    assert built == [path, path]


def test_a_damaged_or_unusable_cache_only_costs_time(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "x.tar", samples(3))
    folder = tmp_path / "cache"
    monkeypatch.setattr(shards, "cache_folder", lambda: folder)
    index = cached_index(path)
    (kept,) = folder.iterdir()
    kept.write_bytes(kept.read_bytes().replace(b"s001", b"s009"))
    assert cached_index(path) == index
    kept.unlink()
    folder.rmdir()
    folder.write_bytes(b"a file")
    assert cached_index(path) == index


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
    with pytest.raises(UserError, match=r"trian-000001\.tar: no such shard.*Did you mean 'train-000001\.tar'"):
        expand(f"{folder}/trian-000001.tar")
    with pytest.raises(
        UserError, match=r"-000003\.tar: no such shard .*\{000000\.\.000003\}.*3 of its 4 names are there"
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
    message = str(error.value)
    assert "30 images" in message
    monkeypatch.chdir(tmp_path)
    source, out, flag, part = command_in(message)
    assert flag == "--val-fraction"
    made = pack(source, out, val_fraction=float(part))
    words = shlex.split(message.splitlines()[-1].replace("(", " ").replace(")", " "))
    train, val = (words[words.index(name) + 1] for name in ("--shards", "--val"))
    assert expand(train) == made["train"]
    assert expand(val) == made["val"]
    assert made["samples"] == {"train": 27, "val": 3}
    assert len(by_us(*made["train"], *made["val"])) == 30


def test_a_folder_of_tars_answers_with_the_pattern_that_names_them(three):
    with pytest.raises(UserError) as error:
        expand(str(Path(three[0]).parent))
    (pattern,) = shlex.split(str(error.value)[str(error.value).index("--shards") :])[1:]
    assert expand(pattern) == three


def test_an_empty_folder_is_said_to_be_one(tmp_path):
    with pytest.raises(UserError, match="neither tars nor class folders"):
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
