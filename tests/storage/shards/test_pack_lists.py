"""Packing a list: every spelling of it, its labels and names, and lists that are refused; nothing is all in memory."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path

import pytest

from storage.errors import UserError
from storage.rng import generator
from tests.storage.helpers import by_us, by_webdataset, keys_in, labels_in, packed, picture, samples, write_tar

# ---------------------------------------------------------------------------------------------- lists


def listing(folder: Path, text: str | bytes, name: str = "list.csv") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return folder / name


def listed(folder: Path, *rows: str, header: str = "path,label", count: int = 4) -> Path:
    """A CSV of these rows beside the images 0.png, 1.png, …"""
    for number in range(count):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(picture(number))
    return listing(folder, "\n".join([header, *rows]) + "\n")


@pytest.fixture(scope="module")
def animals_csv(animals):
    """A list of what is in the class folders, in their order."""
    rows = [f"{path.relative_to(animals)},{path.parent.name}" for path in sorted(animals.rglob("*.png"))]
    return listing(animals.parent / "animals", "path,label\n" + "\n".join(rows))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"seed": 4},
        {"shuffle": False},
        {"per_shard": 20},
        {"fraction": 0.3},
        {"val_fraction": 0.25, "fraction": 0.5},
    ],
)
def test_a_list_of_class_folders_gives_the_shards_that_the_folders_give(tmp_path, animals, animals_csv, settings):
    one, two = (packed(source, tmp_path / source.name, **settings) for source in (animals, animals_csv))
    for ours, theirs in ((one.train, two.train), (one.val, two.val)):
        assert [Path(p).read_bytes() for p in ours] == [Path(p).read_bytes() for p in theirs]
    assert (one.samples, one.classes) == (two.samples, two.classes)
    assert by_us(*two.train, *two.val) == by_webdataset(*two.train, *two.val)


@pytest.mark.parametrize("labeled", [True, False])
def test_webdataset_yields_what_we_read_of_packed_lists(tmp_path, labeled):
    formats = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP", "JPG": "JPEG"}
    rows = []
    for number, (kind, name) in enumerate(formats.items()):
        (tmp_path / f"{number}.{kind}").write_bytes(picture(number, name))
        rows.append(f"{number}.{kind},{number % 2}" if labeled else f"{number}.{kind}")
    source = listing(tmp_path, "\n".join(["path,label" if labeled else "path", *rows]))
    made = packed(source, tmp_path / "out")
    assert by_us(*made.train) == by_webdataset(*made.train)
    assert labels_in(*made.train) == ({0: 3, 1: 2} if labeled else {None: 5})
    assert {kind for _, members in by_us(*made.train) for kind in members} == {
        "png",
        "jpg",
        "jpeg",
        "webp",
        *(["cls"] if labeled else []),
    }


@pytest.mark.parametrize(
    "text",
    [
        "path,label\n0.png,b\n1.png,a\n2.png,b\n",
        "label,path\nb,0.png\na,1.png\nb,2.png",
        "\ufeffpath,label\r\n0.png,b\r\n1.png,a\r\n2.png,b\r\n",
        " Path , LABEL \n0.png, b\n1.png, a \n\n   \n2.png,b\n\n",
        'path,label\n"0.png","b"\n"1.png",a\n2.png, "b"\n',
        "id,path,split,label,note\n7,0.png,train,b,\n8,1.png,,a\n9,2.png,x,b,ü\n",
    ],
    ids=["plain", "other order", "a mark and CRLF", "white space", "quotes", "other columns"],
)
def test_every_spelling_of_a_list_is_the_same_list(tmp_path, text):
    said: list[str] = []
    listed(tmp_path)
    made = packed(listing(tmp_path, text), tmp_path / "out", shuffle=False, say=said.append)
    expected = [("0", {"png": picture(0), "cls": b"1"}), ("1", {"png": picture(1), "cls": b"0"})]
    assert by_us(*made.train) == [*expected, ("2", {"png": picture(2), "cls": b"1"})]
    assert made.classes == ["a", "b"]
    notes = [line for line in said if "other columns" in line]
    assert [note.rpartition(": ")[2] for note in notes] == (["id, split, note"] if "split" in text else [])


def test_a_list_without_labels_is_said_to_be_one(tmp_path):
    said: list[str] = []
    listed(tmp_path)
    made = packed(listing(tmp_path, "path,lable\n0.png,a\n"), tmp_path / "out", "x.tar", say=said.append)
    assert any(line.endswith("no column is called label, so the shards have no labels") for line in said)
    assert made.classes is None


def test_odd_names_and_labels_go_between_quotes(tmp_path):
    for number, name in enumerate(['a,"b".png', "ü ö.png", " x.png"]):
        (tmp_path / name).write_bytes(picture(number))
    text = 'path,label\n"a,""b"".png","cat, ""wild"""\nü ö.png,"dog"\n" x.png",ü\n'
    made = packed(listing(tmp_path, text), tmp_path / "out", "x.tar", shuffle=False)
    assert made.classes == ['cat, "wild"', "dog", "ü"]
    assert [members["png"] for _, members in by_us(*made.train)] == [picture(i) for i in range(3)]
    assert by_us(*made.train) == by_webdataset(*made.train)


def test_paths_are_relative_to_the_list_or_absolute_and_keys_are_as_in_folders(tmp_path, monkeypatch):
    names = ["l/sub/a.png", "l/sub/a.b.png", "l/sub/a_b.png", "other/c.png", "l/.d.png"]
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture(number))
    rows = ["sub/a.png", f"{tmp_path}/l/sub/a.b.png", "./sub//a_b.png", "../other/c.png", ".d.png"]
    source = listing(tmp_path / "l", "\n".join(["path", *rows]))
    made = packed(source, tmp_path / "out", "x.tar", shuffle=False)
    assert keys_in(*made.train) == ["sub_a", "sub_a_b", "sub_a_b-2", "other_c", "_d"]
    assert [members["png"] for _, members in by_us(*made.train)] == [picture(i) for i in range(5)]
    monkeypatch.chdir(tmp_path / "l")
    again = packed("list.csv", tmp_path / "again", "x.tar", shuffle=False)
    assert Path(again.train[0]).read_bytes() == Path(made.train[0]).read_bytes()


def test_labels_from_zero_on_are_the_numbers_themselves(tmp_path):
    rows = [f"{i}.png,{label}" for i, label in enumerate([10, 2, *range(11)])]
    said: list[str] = []
    made = packed(listed(tmp_path, *rows, count=13), tmp_path / "out", shuffle=False, say=said.append)
    assert [int(members["cls"]) for _, members in by_us(*made.train)] == [10, 2, *range(11)]
    assert made.classes == [str(i) for i in range(11)]  # and not 0, 1, 10, 2, …
    assert not any("names" in line for line in said)


@pytest.mark.parametrize(
    "labels", [["1", "2", "3", "10"], ["0", "1", "3", "7"], ["-1", "0", "1", "2"], ["01", "00", "2", "3"]]
)
def test_other_numbers_are_names_and_this_is_said(tmp_path, labels):
    said: list[str] = []
    made = packed(
        listed(tmp_path, *(f"{i}.png,{label}" for i, label in enumerate(labels))),
        tmp_path / "out",
        shuffle=False,
        say=said.append,
    )
    assert made.classes == sorted(labels)
    assert [made.classes[int(members["cls"])] for _, members in by_us(*made.train)] == labels
    assert any("they count as names" in line for line in said)


def test_classes_beside_a_list_name_its_numbers(tmp_path):
    source = listed(tmp_path, "0.png,2", "1.png,0", "2.png,2")
    (tmp_path / "classes.json").write_text('["cat", "dog", "eel", "fox"]')
    made = packed(source, tmp_path / "out", "x.tar", shuffle=False)
    assert made.classes == ["cat", "dog", "eel", "fox"]
    assert [int(members["cls"]) for _, members in by_us(*made.train)] == [2, 0, 2]
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == made.classes


def test_classes_beside_a_list_number_its_names(tmp_path):
    source = listed(tmp_path, "0.png,eel", "1.png,cat")
    (tmp_path / "classes.json").write_text('["eel", "dog", "cat"]')
    made = packed(source, tmp_path / "out", "x.tar", shuffle=False)
    assert made.classes == ["eel", "dog", "cat"]
    assert [int(members["cls"]) for _, members in by_us(*made.train)] == [0, 2]


@pytest.mark.parametrize(
    ("classes", "label", "message"),
    [
        (["cat", "dog"], "2", r"line 3: label '2' is not in the classes\.json"),
        (["cat", "dog"], "eel", r"line 3: label 'eel' is not in the classes\.json"),
        (["1", "0"], "1", r"label 0 may be the number of a class, or the name of class 1"),
        ({"cat": 0}, "cat", r"classes\.json: expected a list"),
    ],
)
def test_classes_beside_a_list_that_do_not_fit_are_refused(tmp_path, classes, label, message):
    first = "0" if label.isdigit() else "cat"
    source = listed(tmp_path, f"0.png,{first}", f"1.png,{label}")
    (tmp_path / "classes.json").write_text(json.dumps(classes))
    with pytest.raises(UserError, match=message):
        packed(source, tmp_path / "out")


def test_a_list_without_labels_makes_shards_without_labels(tmp_path):
    source = listed(tmp_path, *(f"{i}.png" for i in range(4)), header="path")
    (tmp_path / "classes.json").write_text('["cat", "dog"]')
    made = packed(source, tmp_path / "out", val_fraction=0.5)
    assert made.classes is None
    assert made.samples == {"train": 2, "val": 2}
    assert labels_in(*made.train, *made.val) == {None: 4}
    assert not (tmp_path / "out" / "classes.json").exists()


def test_the_classes_beside_a_list_stay_as_they_are_when_shards_come_beside_it(tmp_path):
    source = listed(tmp_path, "0.png,a", "1.png,b")
    (tmp_path / "classes.json").write_text('["a",\n"b"]')
    packed(source, tmp_path, "x.tar")
    assert (tmp_path / "classes.json").read_text() == '["a",\n"b"]'


BAD_LISTS: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", r"line 1: .* the file is empty\n  Expected lines such as\n  path,label\n  cats/1\.jpg,cat"),
    "only a mark": ("\ufeff", r"line 1: "),
    "no header": ("0.png,a\n1.png,b\n", r"line 1: .* names the columns; found '0\.png,a'\n  Expected .*\n  path"),
    "other separators": ("path;label\n0.png;a\n", r"line 1: .*found 'path;label'"),
    "no path column": ("file,label\n0.png,a\n", r"line 1: .*found 'file,label'"),
    "a column twice": ("path,label,label\n0.png,a,b\n", r"line 1: .*found 'path,label,label'"),
    "only a header": ("path,label\n\n", r"list\.csv: no images in it"),
    "no path": ("path,label\n0.png,a\n,b\n", r"line 3: no path in it; give one or remove the line"),
    "no label": ("path,label\n0.png,a\n\n1.png,\n", r"line 4: no label in it; label every row, or leave"),
    "a short row": ("path,label\n0.png\n", r"line 2: no label in it"),
    "too many fields": ("path,label\n0.png,a,b\n", r"line 2: 3 fields, but the header names 2"),
    "a file that is not there": ("path,label\n0.png,a\nx/9.png,b\n", r"line 3: there is no file .*x/9\.png\n  Paths"),
    "a folder": ("path\nfolder.png\n", r"line 2: there is no file .*folder\.png"),
    "a name too long": ("path\n" + "x" * 5000 + ".png\n", r"line 2: 'xxx.* cannot be opened: File name too long"),
    "no image": ("path\nlist.csv\n", r"line 2: 'list\.csv' is not a supported image; expected one of jpg, jpeg"),
    "twice": ("path,label\n0.png,a\n1.png,b\n./0.png,a\n", r"line 4: '\./0\.png' is already in line 2"),
    "not UTF-8": (b"path,label\n0.png,a\n1.png,caf\xe9\n", r"line 3: not UTF-8 .*; save the list as UTF-8"),
    "UTF-16": ("path,label\n0.png,a\n".encode("utf-16"), r"line 1: (a NUL byte|not UTF-8)"),
    "a NUL": (b"path,label\n0.png,a\n1.png\0,b\n", r"line 3: a NUL byte in it"),
    "an open quote": ('path,label\n0.png,a\n"1.png,b\n2.png,c\n', r"line 4: not CSV: .*\n  Expected lines such as\n"),
    "text after a quote": ('path,label\n"0.png"x,a\n', r"line 2: not CSV: "),
    "a field too long": ("path,label\n0.png," + "a" * 200_000, r"line 2: not CSV: .*field limit"),
    "lines of old Macs": ("path,label\r0.png,a\r1.png,b\r", r"line 1: not CSV: "),
}


@pytest.mark.parametrize("what", BAD_LISTS)
def test_lists_that_are_refused(tmp_path, what):
    text, message = BAD_LISTS[what]
    listed(tmp_path)
    (tmp_path / "folder.png").mkdir()
    source = listing(tmp_path, text)
    with pytest.raises(UserError, match=message) as error:
        packed(source, tmp_path / "out")
    assert str(error.value).startswith(str(source))
    assert not (tmp_path / "out").exists()


def test_a_list_that_is_not_there_or_not_alone_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.csv: cannot be opened"):
        packed(tmp_path / "nothing.csv", tmp_path / "out")
    with pytest.raises(UserError, match="packed alone"):
        packed([str(listed(tmp_path, "0.png,a")), write_tar(tmp_path / "x.tar", samples(2))], tmp_path / "out")
    with pytest.raises(UserError, match="local folder"):
        packed("memory://x/list.csv", tmp_path / "out")


def test_an_image_that_goes_away_while_it_is_packed_leaves_no_shards(tmp_path):
    source = listed(tmp_path, *(f"{i}.png,a" for i in range(4)))

    def say(line: str) -> None:
        if "000001" in line:
            (tmp_path / "3.png").unlink()

    with pytest.raises(UserError, match=r"3\.png: cannot be read: No such file"):
        packed(source, tmp_path / "out", shuffle=False, say=say)
    assert not list((tmp_path / "out").iterdir())


# ---------------------------------------------------------------------------------------------- bounds


@pytest.mark.parametrize("kind", ["folder", "list", "tar", "compressed"])
def test_images_are_never_all_in_memory(tmp_path, kind):
    import webdataset  # noqa: F401  # its own memory is no part of this

    (tmp_path / "f" / "a").mkdir(parents=True)
    for number in range(24):  # pack looks into no image
        (tmp_path / "f" / "a" / f"{number}.jpg").write_bytes(generator("large", number).bytes(1 << 20))
    listing(tmp_path, "path\n" + "\n".join(f"f/a/{number}.jpg" for number in range(24)))
    members = [(f"{path.stem}.jpg", path.read_bytes()) for path in (tmp_path / "f" / "a").iterdir()]
    write_tar(tmp_path / "x.tar", members)
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress((tmp_path / "x.tar").read_bytes(), 1))
    del members
    source = tmp_path / {"folder": "f", "list": "list.csv", "tar": "x.tar", "compressed": "x.tar.gz"}[kind]
    tracemalloc.start()
    try:
        assert packed(source, tmp_path / "out").samples == {"train": 24}
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
