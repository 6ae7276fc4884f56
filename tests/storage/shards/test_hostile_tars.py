"""Hostile tars and class lists: each is read as webdataset reads it or refused, and nothing hangs.

What is only damaged or cut off is in test_cut_shards.py.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import os
import resource
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from storage.errors import UserError
from storage.shards.classes import classes_of
from storage.shards.index import build_index, read_samples
from storage.shards.pack import pack
from storage.shards.tar import MAX_MEMBER_BYTES, iter_samples, to_sample
from tests.storage.helpers import by_us, by_webdataset, picture, samples, write_tar

pytestmark = pytest.mark.usefixtures("never_hangs")


# ---------------------------------------------------------------------------------------------- tars by hand


def member(
    name: bytes, data: bytes = picture(0), kind: bytes = b"0", size: bytes | None = None, **fields: bytes
) -> bytes:
    """A header with any fields, and its data. `fields`: prefix, link, at483, …"""
    header = bytearray(512)
    places = {"link": 157, "prefix": 345}
    content = {
        0: name,
        100: b"0000644\0",
        108: b"0000000\0",
        116: b"0000000\0",
        136: b"00000000000\0",
        156: kind,
        124: b"%011o\0" % len(data) if size is None else size,
        257: b"ustar\x0000",
        **{places.get(field) or int(field[2:]): value for field, value in fields.items()},
    }
    for at, value in content.items():
        header[at : at + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data + bytes(-len(data) % 512)


def pax(kind: bytes = b"x", **fields: bytes) -> bytes:
    """An extended header; `GNU_sparse_size` stands for `GNU.sparse.size`."""
    body = b""
    for name, value in fields.items():
        record = b" %s=%s\n" % ((name if "." in name else name.replace("_", ".")).encode(), value)
        length = next(n for n in range(len(record) + 1, len(record) + 9) if len(b"%d" % n) + len(record) == n)
        body += b"%d" % length + record
    return member(b"PaxHeaders/x", body, kind)


def binary(number: int) -> bytes:
    """A size as GNU tar writes those that octal digits cannot say."""
    return (number & (1 << 96) - 1 | (0 if number < 0 else 1 << 95)).to_bytes(12, "big")


OK = member(b"a.cls", b"0") + member(b"a.png")
B = member(b"b.png")
LONG = b"././@LongLink"
END = bytes(1024)

REFUSED_TARS = {
    "a long name that climbs": (member(LONG, b"../../b.png\0", b"L") + B, "leads outside"),
    "a prefix that climbs": (member(b"b.png", prefix=b".."), "leads outside"),
    "an absolute prefix": (member(b"b.png", prefix=b"/x"), "leads outside"),
    "an extended path that climbs": (pax(path=b"x/../../b.png") + B, "leads outside"),
    "an absolute extended path": (pax(path=b"/b.png") + B, "leads outside"),
    "a folder that climbs": (member(b"../d/", b"", b"5"), "leads outside"),
    "a NUL in a name": (pax(path=b"b\0c.png") + B, "NUL in its name"),
    "an extended path that is not UTF-8": (pax(path=b"b\xff.png") + B, "UTF-8"),
    "a path that says it is binary": (pax(hdrcharset=b"BINARY", path=b"b\xff.png") + B, "UTF-8"),
    "a long name that is not UTF-8": (member(LONG, b"\xff.png\0", b"L") + B, "UTF-8"),
    "the name of another member": (member(b"c.png") + pax(path=b"c.png") + B, "two members of the same kind"),
    "a block device": (member(b"b.png", b"", b"4"), "link or a device"),
    "a link with a size": (member(b"b.png", b"", b"1", size=binary(10**10), link=b"a.png"), "link or a device"),
    "a type that is none": (member(b"b.png", kind=b"Z"), "link or a device"),
    "old sparse": (member(b"b.png", kind=b"S", at483=b"77777777777\0"), "or sparse"),
    "old sparse that goes on": (member(b"b.png", b"", b"S", at482=b"\1", at483=b"00000000100\0"), "or sparse|as a tar"),
    "sparse 0.0": (pax(GNU_sparse_size=b"99999999999999") + B, "or sparse"),
    "sparse 0.1": (pax(GNU_sparse_map=b"0,1") + B, "or sparse"),
    "sparse 0.1 of no numbers": (pax(GNU_sparse_map=b"0,x") + B, "as a tar"),
    "sparse 1.0": (
        pax(GNU_sparse_major=b"1", GNU_sparse_minor=b"0", GNU_sparse_realsize=b"5")
        + member(b"b.png", b"1\n0\n5\n" + bytes(506) + b"hello"),
        "or sparse",
    ),
    "sparse 1.0 without an end": (
        pax(GNU_sparse_major=b"1", GNU_sparse_minor=b"0") + member(b"b.png", b"99999999\n1\n"),
        "as a tar",
    ),
    "a sparse size alone": (pax(GNU_sparse_realsize=b"4") + B, "or sparse"),
    "a sparse name alone": (pax(GNU_sparse_name=b"c.png") + B, "or sparse"),
    "a huge size": (member(b"b.png", size=binary(10**15)), "truncated inside 'b.png'"),
    "the hugest size": (member(b"b.png", size=b"\x80" + b"\xff" * 11), "truncated inside 'b.png'"),
    "a size in other digits": (member(b"b.png", size=b"zzzzzzzzzzz\0"), "damaged after byte|as a tar"),
    "a huge extended size": (pax(size=b"9" * 30) + B, "truncated inside 'b.png'"),
    "an extended size of many digits": (pax(size=b"9" * 5000) + B, "damaged after byte"),
    "a negative extended size": (pax(size=b"-512") + B, "truncated inside 'b.png'"),
    "an extended size that hides": (pax(size=b"0") + B, "damaged after byte"),
    "an extended record of many digits": (member(b"x", b"9" * 5000 + b" a=b\n", b"x") + B, "as a tar"),
    "an extended record of no length": (member(b"x", b"0 a=b\n", b"x") + B, "damaged after byte|as a tar"),
    "a global path": (pax(b"g", path=b"b.png") + B, "global header"),
    "a global size": (pax(b"g", size=b"0") + B, "global header"),
    "a long name of nothing": (member(LONG, b"b.png\0", b"L"), "as a tar"),
    "an extended header of nothing": (pax(path=b"b.png"), "as a tar"),
    "a chain of long names": (member(LONG, b"b.png\0", b"L") * 1500 + B, "as a tar: maximum recursion"),
    "a chain of extended headers": (pax(path=b"b.png") * 1500 + B, "as a tar: maximum recursion"),
    "a chain of global headers": (pax(b"g", comment=b"x") * 1500 + B, "as a tar: maximum recursion"),
    "a long name too long": (member(LONG, b"x" * (2 << 20), b"L") + B, "as a tar: a header claims 2097152 bytes"),
    "an extended header too long": (pax(comment=b"x" * (2 << 20)) + B, "as a tar: a header claims"),
    **{
        f"{size} bytes for {what}": (member(b"b.png", kind=kind, size=binary(size)), "claims -|link or a device")
        for size in (-512, -256, -(2**40))
        for what, kind in {
            "a file": b"0",
            "a folder": b"5",
            "a long name": b"L",
            "a long link": b"K",
            "a header": b"x",
            "a global header": b"g",
            "a volume": b"V",
            "a sparse file": b"S",
            "a type that is none": b"Z",
        }.items()
    },
    "WebDataset's key": (member(b"b.__key__", b"x") + B, "key 'b': WebDataset (keeps|writes)"),
    "WebDataset's url": (member(b"b.__url__", b"x") + B, "key 'b': WebDataset (keeps|writes)"),
    "a label of ten digits": (member(b"b.cls", b"9999999999") + B, "key 'b': the label is b'9999999999'"),
    "a label of many digits": (member(b"b.cls", b"1" * 1_000_000) + B, "key 'b': the label is b'1111111111111111111"),
    "a label with a sign": (member(b"b.cls", b"+1") + B, "key 'b': the label"),
    "a label with a line": (member(b"b.cls", b"1_0") + B, "key 'b': the label"),
    "a label with a NUL": (member(b"b.cls", b"1\0") + B, "key 'b': the label"),
    "a label in wide digits": (member(b"b.cls", "１".encode()) + B, "key 'b': the label"),
    "a label in hexadecimal digits": (member(b"b.cls", b"0x1") + B, "key 'b': the label"),
    "two labels": (member(b"b.cls", b"1\n2") + B, "key 'b': the label"),
}


def by_ranges(data: bytes) -> list[str]:
    return [to_sample(key, parts, "x.tar").key for key, parts, _, _ in iter_samples(io.BytesIO(data), "x.tar")]


@pytest.mark.parametrize("what", REFUSED_TARS)
def test_tars_that_are_refused(tmp_path, what):
    data, message = REFUSED_TARS[what]
    path = tmp_path / "x.tar"
    for before in (OK, b""):  # in the middle of a tar, and as its first header
        path.write_bytes(before + data + END)
        with pytest.raises(UserError, match=message) as error:
            build_index(str(path))
        assert str(path) in str(error.value)
        assert len(str(error.value)) < 1000
        with pytest.raises(UserError, match=message):
            pack(str(path), str(tmp_path / "out" / "y.tar"))
        assert not [*(tmp_path / "out").glob("*"), *(tmp_path / "out").glob(".*")]
        if "damaged after" not in message:  # what is no header at all ends a range: the index knows how many must come
            with pytest.raises(UserError, match=message):
                by_ranges(before + data + END)
        for cut in range(512, len(data), max(512, len(data) // 4096 * 512)):  # without the rest
            path.write_bytes(before + data[:cut])
            with pytest.raises(UserError):
                build_index(str(path))


READ_TARS = {
    "an extended path": (pax(path="ü/long.png".encode()) + B, "ü/long"),
    "an extended size": (pax(size=b"%d" % len(picture(0))) + member(b"b.png", size=b"00000000000\0"), "b"),
    "extended times and owners that are none": (pax(mtime=b"inf", uid=b"x", comment=b"-") + B, "b"),
    "an extended attribute that is binary": (pax(**{"SCHILY.xattr.user.x": b"\xff\0\n\xfe=1"}) + B, "b"),
    "an access list of libarchive": (pax(**{"LIBARCHIVE.xattr.system.posix_acl_access": bytes(range(256))}) + B, "b"),
    "a global attribute that is binary": (pax(b"g", **{"SCHILY.xattr.user.x": b"\xff"}) + B, "b"),
    "an extended field whose name is binary": (pax(**{"x": b"1"}).replace(b"x=1", b"\xff=1") + B, "b"),
    "an owner that is not UTF-8": (pax(uname=b"J\xfcrgen", gname=b"\xff") + member(b"b.png", at265=b"J\xfcrgen"), "b"),
    "an extended link's target of a file": (pax(linkpath=b"../x") + B, "b"),
    "a global comment": (pax(b"g", comment=b"0123abc") + B, "b"),
    "a long name": (member(LONG, b"c/d.png\0", b"L") + B, "c/d"),
    "a contiguous file": (member(b"b.png", kind=b"7"), "b"),
    "a folder that claims a size": (member(b"d/", b"", b"5", size=binary(10**9)) + B, "b"),
    "a line break in a name": (member(b"b\nc.png"), "b\nc"),
    "signs for terminals in a name": (member(b"b\x1b[31m.png"), "b\x1b[31m"),
    "dots and slashes": (member(b"./x//b.png"), "./x//b"),
    "JSON that is none": (member(b"b.json", b"{") + B, "b"),
    "JSON that is not UTF-8": (member(b"b.json", b"\xff\xfe{") + B, "b"),
    "JSON that is empty": (member(b"b.json", b"") + B, "b"),
    "JSON that is deep": (member(b"b.json", b"[" * 100_000) + B, "b"),
    "JSON that is no number": (member(b"b.json", b"NaN") + B, "b"),
}


@pytest.mark.parametrize("what", READ_TARS)
def test_tars_that_are_odd_are_read_and_packed_as_webdataset_reads_them(tmp_path, what):
    data, key = READ_TARS[what]
    path = tmp_path / "x.tar"
    path.write_bytes(OK + data + member(b"z.png", picture(1)) + END)
    index = build_index(str(path))
    assert index.keys == ("a", key, "z")
    assert by_us(str(path)) == by_webdataset(str(path))
    assert [read_samples(str(path), index, range(i, i + 1))[0].key for i in range(3)] == list(index.keys)
    (made,) = pack(str(path), str(tmp_path / "out" / "y.tar"), shuffle=False).train
    assert by_us(made) == by_webdataset(made) == by_us(str(path))


@pytest.mark.parametrize("name", [b"b.", b"b._x", b"b._"])
def test_members_that_webdataset_cannot_write_are_read_and_not_packed(tmp_path, name):
    path = tmp_path / "x.tar"
    path.write_bytes(OK + member(name, b"x") + B + END)
    assert build_index(str(path)).keys == ("a", "b")
    with pytest.raises(UserError, match=r"x\.tar: key 'b': WebDataset writes no member called"):
        pack(str(path), str(tmp_path / "out" / "y.tar"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "size"), [(b"0", MAX_MEMBER_BYTES + 1), (b"0", 50 << 30), (b"L", 50 << 30), (b"x", 50 << 30)]
)
def test_a_member_as_long_as_its_file_takes_no_memory(tmp_path, kind, size):
    path = tmp_path / "x.tar"
    path.write_bytes(member(b"b.png", b"", kind, size=binary(size)))
    os.truncate(path, 512 + size // 512 * 512 + 2048)  # holes: it takes no room on the disk
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for look in (build_index, lambda url: pack(url, str(tmp_path / "out" / "y.tar"))):
        with pytest.raises(UserError, match="bytes"):
            look(str(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << (10 if sys.platform != "darwin" else 20)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_damaged_long_headers_end_in_a_clear_error_or_in_samples(tmp_path, form):
    names = [f"{'long/' * 40}ü{i}" for i in range(3)]
    path = Path(write_tar(tmp_path / "x.tar", [(f"{name}.png", picture(0)) for name in names], format=form))
    data, chance = path.read_bytes(), np.random.default_rng(0)
    heads = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
    for _ in range(300):
        bad = bytearray(data)
        at = int(chance.choice(heads))
        bad[at + int(chance.choice([124, 134, 156, 482, 483, int(chance.integers(512))]))] = chance.choice(
            [0x80, 255, *b"0LKSxgX"]
        )
        bad[at + 512 + int(chance.integers(40))] = chance.choice([0, 255, *b" =\n0129"])  # in names and records
        bad[at + 148 : at + 156] = b" " * 8
        bad[at + 148 : at + 156] = b"%06o\0 " % sum(bad[at : at + 512])
        path.write_bytes(bad)
        for look in (lambda: build_index(str(path)), lambda: by_ranges(bytes(bad))):  # noqa: B023
            try:
                look()
            except UserError as error:
                assert "x.tar" in str(error)  # noqa: PT017


# ---------------------------------------------------------------------------------------------- compressed, named


def test_a_compressed_tar_with_changed_bytes_is_refused(tmp_path):
    whole = Path(write_tar(tmp_path / "whole.tar", samples(40))).read_bytes()
    path = tmp_path / "x.tar.gz"
    for at in range(20, 2000, 90):
        data = bytearray(gzip.compress(whole))
        data[at] ^= 0xFF
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"x\.tar\.gz: "):
            pack(str(path), str(tmp_path / "out" / "y.tar"))
    assert not (tmp_path / "out").exists()


def test_a_compressed_tar_that_would_fill_the_disk_is_refused(tmp_path):
    (tmp_path / "x.tar.bz2").write_bytes(bz2.compress(bytes(100 << 20)))
    with pytest.raises(UserError, match=r"x\.tar\.bz2: more than [0-9,]+ bytes once decompressed"):
        pack(str(tmp_path / "x.tar.bz2"), str(tmp_path / "y.tar"))


def test_names_of_classes_that_are_not_utf8_are_refused_before_anything_is_written(tmp_path):
    try:
        (tmp_path / "f" / os.fsdecode(b"caf\xe9")).mkdir(parents=True)
    except OSError:
        pytest.skip("this file system keeps names as UTF-8")
    (tmp_path / "f" / os.fsdecode(b"caf\xe9/\xff.png")).write_bytes(picture(0))
    (tmp_path / "f" / "bar").mkdir()
    (tmp_path / "f" / "bar" / "1.png").write_bytes(picture(1))
    with pytest.raises(UserError, match=r"class 'caf\\udce9': its name is not UTF-8"):
        pack(str(tmp_path / "f"), str(tmp_path / "out" / "y.tar"))
    (tmp_path / "f" / os.fsdecode(b"caf\xe9")).rename(tmp_path / "f" / "cafe")
    made = pack(str(tmp_path / "f"), str(tmp_path / "out" / "y.tar"))
    assert by_us(*made.train) == by_webdataset(*made.train)
    assert dict(by_us(*made.train))["cafe__"] == {"png": picture(0), "cls": b"1"}


CLASS_LISTS = {
    "deep": b"[" * 1_000_000,
    "deep and closed": b'["a",' + b"[" * 200_000 + b"]" * 200_001,
    "deep objects": b'{"a":' * 200_000,
    "not a number": b"[NaN]",
    "infinite": b"[1e999]",
    "a long number": b"[" + b"9" * 100_000 + b"]",
    "latin-1": '["caf\xe9"]'.encode("latin-1"),
    "half of a sign": b'["\\ud800"]',
    "a name among numbers": b'["a", 1]',
    "an object that looks like a list": b'{"0": "a"}',
}


@pytest.mark.parametrize("what", CLASS_LISTS)
def test_hostile_class_lists_are_refused(tmp_path, what):
    (tmp_path / "classes.json").write_bytes(CLASS_LISTS[what])
    path = write_tar(tmp_path / "x.tar", samples(2))
    with pytest.raises(UserError, match=r"classes\.json|not UTF-8") as error:
        pack(path, str(tmp_path / "out" / "y.tar"))
    assert len(str(error.value)) < 1000
    assert not (tmp_path / "out").exists()


def test_a_long_class_list_is_a_class_list(tmp_path):
    names = [f"class {i} ü" for i in range(100_000)]
    (tmp_path / "classes.json").write_text(json.dumps(names))
    path = write_tar(tmp_path / "x.tar", samples(2))
    assert pack(path, str(tmp_path / "out" / "y.tar")).classes == names
    assert classes_of([str(tmp_path / "out" / "y.tar")]) == names
