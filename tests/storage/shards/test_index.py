"""Shards: what is read is what webdataset reads, whatever its keys, and other content is another shard."""

from __future__ import annotations

import hashlib
import itertools
import tarfile
import uuid
from pathlib import Path

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from storage.errors import IdentityError, UserError
from storage.shards import index as shards
from storage.shards.index import ShardIndex, build_index, cached_index, is_same_shard, read_samples
from storage.shards.patterns import expand
from storage.shards.tar import split_name, stem_of
from storage.testing import synthetic_shards
from tests.storage.helpers import by_us, by_webdataset, patched, picture, sample, samples, write_tar


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
    path = write_tar(tmp_path / "x.tar", [("a.json", b'{"license": "none"}'), *sample("a", 0), *sample("b", 1)])
    assert by_us(path) == by_webdataset(path)
    assert read_samples(path, build_index(path), range(1))[0].json == b'{"license": "none"}'


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
@settings(max_examples=200)
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
    relabeled = [(name, b"9" if name.endswith("cls") else data) for name, data in samples(5)]
    for number, members in enumerate([samples(5), relabeled, [("README", b"x"), *samples(5)]]):
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
        ("a/x-0001.tar", "x-0001"),
        ("x.tar.gz", "x"),
        ("x.tgz", "x"),
        ("s3://b/ü.v1.tar", "__v1"),
        ("x", "x"),
        ("a" * 99 + ".tar", "a" * 80),
    ],
)
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
    assert is_same_shard(path, index.summary)  # size, first and last block are what they were
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
    assert is_same_shard(path, index.summary)
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
    assert not is_same_shard(long, build_index(short).summary)
    assert is_same_shard(short, build_index(short).summary)


@pytest.mark.parametrize("key", [b"s000.", b"s129."])
def test_a_file_with_another_first_or_last_block_is_another_shard(tmp_path, key):
    path = write_tar(tmp_path / "x.tar", samples(130))
    known = build_index(path).summary
    assert is_same_shard(path, known)
    patched(path, key, key.upper())
    assert not is_same_shard(path, known)


def test_a_file_of_another_size_is_another_shard(tmp_path):
    path = write_tar(tmp_path / "x.tar", samples(130))
    known = build_index(path).summary
    write_tar(Path(path), samples(160))
    assert not is_same_shard(path, known)


# ---------------------------------------------------------------------------------------------- the cache


def test_the_cached_index_is_used_until_the_file_changes(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "x.tar", samples(3))
    built = []

    def build(url: str) -> ShardIndex:
        built.append(url)
        return build_index(url)

    monkeypatch.setattr(shards, "build_index", build)
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
