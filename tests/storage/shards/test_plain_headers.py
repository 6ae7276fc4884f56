"""Samples with ordinary headers are read without tarfile; any doubt is left to it, with its words and its refusals."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import webdataset

from storage.errors import IdentityError, UserError
from storage.shards import index as indexes
from storage.shards.index import build_index, read_samples
from tests.storage.helpers import by_webdataset, patched, picture, sample, samples, write_tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "GNU": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def without_tarfile(monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("tarfile read it")

    monkeypatch.setattr("storage.shards.tar.tarfile.open", refuse)


def written(path: Path, form: str) -> str:
    name = "d.e/" if form in ("pax", "webdataset") else "d.e/ü"  # pax has a header of its own for other signs
    members = [m for i in range(70) for m in [*sample(f"{name}{i}", i, i % 3), (f"{name}{i}.JSON", b"{}")]]
    if form in FORMATS:
        with tarfile.open(path, "w", format=FORMATS[form]) as made:
            for called, data in members:
                info = tarfile.TarInfo(called)
                info.size, info.mtime = len(data), 1.5 if form == "pax" else 1  # as `TarFile.add` has it
                made.addfile(info, io.BytesIO(data))
    else:
        with webdataset.TarWriter(str(path)) as writer:  # with the time of now
            for i in range(70):
                writer.write({"__key__": f"{name}{i}", "png": picture(i), "cls": i % 3, "json": {}})
    return str(path)


@pytest.mark.parametrize("form", [*FORMATS, "webdataset"])
def test_what_is_read_without_tarfile_is_what_webdataset_reads(tmp_path, monkeypatch, form) -> None:
    path = written(tmp_path / "x.tar", form)
    index, theirs = build_index(path), by_webdataset(path)
    without_tarfile(monkeypatch)
    read = [s for start, stop in ((0, 64), (64, 65), (65, 70)) for s in read_samples(path, index, range(start, stop))]
    assert len(read) == len(theirs) == 70
    for one, (key, members) in zip(read, theirs, strict=True):
        assert (one.key, one.image, one.json) == (key, members["png"], members["json"])
        assert str(one.label).encode() == members["cls"]


@pytest.mark.parametrize("text", [b"007", b" 7\n", b"7"])
def test_labels_are_read_as_numbers(tmp_path, monkeypatch, text) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.cls", text), ("a.png", picture(0))])
    index = build_index(path)
    without_tarfile(monkeypatch)
    assert read_samples(path, index, range(1))[0].label == 7


def outcome(path: str, index: indexes.ShardIndex) -> object:
    try:
        return read_samples(path, index, range(len(index)))
    except UserError as error:
        return type(error), str(error)


def test_any_byte_that_changes_ends_as_tarfile_says_and_never_in_another_sample(tmp_path, monkeypatch) -> None:
    path = Path(write_tar(tmp_path / "x.tar", samples(3)))
    index, data = build_index(str(path)), path.read_bytes()
    whole = read_samples(str(path), index, range(3))
    silent = 0
    for at in range(index.starts[1], index.starts[2]):
        changed = bytearray(data)
        changed[at] ^= 1
        path.write_bytes(changed)
        found = outcome(str(path), index)
        with monkeypatch.context() as patch:
            patch.setattr(indexes, "plain_samples", lambda *_: None)
            assert found == outcome(str(path), index), at
        if isinstance(found, list):
            assert found == whole
            silent += 1
    assert 0 < silent < 1024  # the padding alone: what fills the last 512 bytes of each of two members


def test_swapped_images_are_named(tmp_path) -> None:
    path = write_tar(tmp_path / "x.tar", samples(6))
    index = build_index(path)
    members = dict(samples(6))
    members["s002.png"], members["s004.png"] = members["s004.png"], members["s002.png"]
    write_tar(Path(path), list(members.items()))
    with pytest.raises(IdentityError, match=r"key s002: image digest"):
        read_samples(path, index, range(6))


@pytest.mark.parametrize(("old", "new"), [(b"1", b"2"), (b"1", b"x"), (b"1", b" ")])
def test_a_label_that_was_changed_in_its_place_is_named(tmp_path, old, new) -> None:
    path = Path(write_tar(tmp_path / "x.tar", samples(6)))
    index, data = build_index(str(path)), bytearray(path.read_bytes())
    at = index.starts[4] + 512
    assert data[at : at + 1] == old
    data[at : at + 1] = new
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"s004.*label"):
        read_samples(str(path), index, range(6))


@pytest.mark.parametrize(("label", "old", "new"), [(1, b"b.cls", b"b.txt"), (None, b"b.txt", b"b.cls")])
def test_a_label_that_is_gone_or_new_is_named(tmp_path, label, old, new) -> None:
    path = write_tar(
        tmp_path / "x.tar", [*sample("a", 0), *sample("b", 1, label), ("b.txt" if label is None else "b.json", b"2")]
    )
    index = build_index(path)
    patched(path, old, new)
    with pytest.raises(IdentityError, match="key b: label"):
        read_samples(path, index, range(2))
