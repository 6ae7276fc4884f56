"""Pack: nothing is lost, nothing is doubled, the order is the seed's, and what was there stays."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest

from storage.errors import UserError
from storage.pack import pack
from storage.shards import build_index, cached_index
from storage.testing import synthetic_shards
from storage.views import generator
from tests.storage.helpers import by_us, by_webdataset, class_folders, picture, sample, samples, write_tar


@pytest.fixture(scope="module")
def animals(tmp_path_factory):
    """Class folders of unequal size."""
    return class_folders(tmp_path_factory.mktemp("animals") / "animals", {"cat": 17, "dog": 10, "eel": 4})


def labels_in(*paths: str) -> Counter:
    return Counter(label for path in paths for label in build_index(path).labels)


def digests_in(*paths: str) -> list[str]:
    return [digest for path in paths for digest in build_index(path).digests]


def keys_in(*paths: str) -> list[str]:
    return [key for path in paths for key in build_index(path).keys]


def packed(source, out: Path, name: str = "x-{000000..000001}.tar", **settings):
    return pack(source if isinstance(source, list) else str(source), str(out / name), **settings)


# ---------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_webdataset_yields_what_we_read_of_packed_folders(tmp_path, kind):
    made = packed(class_folders(tmp_path / "f", {"a": 3, "b": 2}, kind), tmp_path / "out")
    ours = by_us(*made["train"])
    assert ours == by_webdataset(*made["train"])
    assert sorted(key for key, _ in ours) == ["a_000", "a_001", "a_002", "b_000", "b_001"]
    written = {(tmp_path / "f").joinpath(*key.split("_")).with_suffix(f".{kind}").read_bytes() for key, _ in ours}
    assert {members[kind] for _, members in ours} == written


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_webdataset_yields_what_we_read_of_packed_shards(tmp_path, kind):
    sources = synthetic_shards(tmp_path / "in", shards=3, samples=7, size=(8, 8), kind=kind)
    made = packed(sources, tmp_path / "out")
    assert by_us(*made["train"]) == by_webdataset(*made["train"])
    assert sorted(by_us(*made["train"])) == sorted(by_us(*sources))
    assert made["samples"] == {"train": 21}


def test_other_members_and_odd_labels_stay_as_they_are(tmp_path):
    members = [("a.json", b'{"x": 1}'), ("a.cls", b" 2\n"), ("a.txt", b"a cat"), ("a.png", picture(0)), *sample("b", 1)]
    path = write_tar(tmp_path / "x.tar", members)
    made = packed([path], tmp_path / "out", "y.tar", shuffle=False)
    assert by_webdataset(*made["train"]) == by_webdataset(path)


def test_unlabelled_shards_stay_unlabelled(tmp_path):
    made = packed(synthetic_shards(tmp_path / "in", samples=5, size=(8, 8), labels=False), tmp_path / "out")
    assert labels_in(*made["train"]) == {None: 10}


def test_labels_are_the_places_of_the_classes_in_their_list(tmp_path, animals):
    made = packed(animals, tmp_path)
    assert made["classes"] == ["cat", "dog", "eel"]
    assert json.loads((tmp_path / "classes.json").read_text()) == made["classes"]
    assert labels_in(*made["train"]) == {0: 17, 1: 10, 2: 4}
    assert all(key.startswith(made["classes"][int(members["cls"])]) for key, members in by_us(*made["train"]))


def test_class_lists_of_shards_come_along(tmp_path):
    made = packed(synthetic_shards(tmp_path / "in", samples=5, size=(8, 8)), tmp_path / "out")
    assert made["classes"] == ["class0", "class1", "class2"]
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == made["classes"]


def test_class_folders_are_searched_deep_and_names_may_be_long_or_odd(tmp_path):
    names = ["a/deep/er/1.png", "a/ü ö.v2.PNG", "a/" + "long " * 20 + "/" + "y" * 120 + ".png", "b/1.png"]
    for number, name in enumerate(names):
        (tmp_path / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "f" / name).write_bytes(picture(number))
    (tmp_path / "f" / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "f" / ".hidden").mkdir()
    made = packed(tmp_path / "f", tmp_path / "out", shuffle=False)
    assert made["classes"] == ["a", "b"]
    assert by_us(*made["train"]) == by_webdataset(*made["train"])
    assert {members["png"] for _, members in by_us(*made["train"])} == {picture(i) for i in range(4)}


# ---------------------------------------------------------------------------------------------- order and parts


def test_the_same_seed_gives_the_same_bytes(tmp_path, animals):
    one, two = (packed(animals, tmp_path / name, seed=3)["train"] for name in ("a", "b"))
    assert [Path(p).read_bytes() for p in one] == [Path(p).read_bytes() for p in two]


def test_another_seed_gives_another_order_of_the_same_samples(tmp_path, animals):
    keys = [keys_in(*packed(animals, tmp_path / str(seed), seed=seed)["train"]) for seed in (0, 1)]
    assert keys[0] != keys[1]
    assert sorted(keys[0]) == sorted(keys[1])
    assert sorted(keys[0]) != keys[0]


def test_without_shuffling_the_order_of_the_source_stays(tmp_path, animals):
    keys = keys_in(*packed(animals, tmp_path / "a", shuffle=False)["train"])
    assert keys == sorted(keys)
    shards = [write_tar(tmp_path / f"{i}.tar", samples(4, first=i * 4)) for i in (1, 0)]
    assert keys_in(*packed(shards, tmp_path / "b", shuffle=False)["train"]) == keys_in(*shards)


def test_shuffling_goes_over_all_shards(tmp_path):
    shards = [write_tar(tmp_path / f"{i}.tar", samples(32, first=i * 32)) for i in range(2)]
    made = packed(shards, tmp_path / "out")["train"]
    from_first = sum(key < "s032" for key in keys_in(made[0]))
    assert 8 <= from_first <= 24


def test_samples_are_spread_evenly_over_the_names(tmp_path, animals):
    made = packed(animals, tmp_path, "x-{0..6}.tar")
    counts = [len(build_index(path)) for path in made["train"]]
    assert sum(counts) == 31
    assert max(counts) - min(counts) <= 1
    assert made["train"] == [str(tmp_path / f"x-{i}.tar") for i in range(7)]


def test_per_shard_uses_as_many_names_as_it_needs(tmp_path, animals):
    made = packed(animals, tmp_path, "x-{0..6}.tar", per_shard=8)
    assert [len(build_index(path)) for path in made["train"]] == [8, 8, 8, 7]
    assert sorted(p.name for p in tmp_path.glob("*.tar")) == ["x-0.tar", "x-1.tar", "x-2.tar", "x-3.tar"]


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.999])
def test_a_fraction_is_balanced_over_the_classes(tmp_path, animals, fraction):
    made = packed(animals, tmp_path, fraction=fraction)
    assert labels_in(*made["train"]) == {i: max(1, round(n * fraction)) for i, n in enumerate([17, 10, 4])}


def test_a_fraction_of_a_whole_number_is_not_one_more(tmp_path):
    assert 25 * 0.28 > 7
    folder = class_folders(tmp_path / "f", {"a": 25, "b": 50})
    assert labels_in(*packed(folder, tmp_path / "out", fraction=0.28)["train"]) == {0: 7, 1: 14}


def test_validation_is_disjoint_and_together_they_are_complete(tmp_path, animals):
    made = packed(animals, tmp_path, val_fraction=0.25)
    train, val = digests_in(*made["train"]), digests_in(*made["val"])
    assert not set(train) & set(val)
    assert sorted(train + val) == sorted(digests_in(*packed(animals, tmp_path / "all")["train"]))
    assert labels_in(*made["val"]) == {0: 4, 1: 2, 2: 1}
    assert made["samples"] == {"train": 24, "val": 7}
    assert [Path(path).name for path in made["val"]] == ["x-val-000000.tar"]
    assert by_us(*made["val"]) == by_webdataset(*made["val"])


def test_a_fraction_leaves_the_validation_samples_what_they_are(tmp_path, animals):
    whole = packed(animals, tmp_path / "a", val_fraction=0.25)
    part = packed(animals, tmp_path / "b", val_fraction=0.25, fraction=0.5)
    assert set(digests_in(*part["val"])) == set(digests_in(*whole["val"]))
    assert set(digests_in(*part["train"])) < set(digests_in(*whole["train"]))


def test_the_choice_of_validation_samples_is_the_seeds(tmp_path, animals):
    chosen = [set(digests_in(*packed(animals, tmp_path / str(s), val_fraction=0.5, seed=s)["val"])) for s in (0, 1)]
    assert chosen[0] != chosen[1]


@pytest.mark.parametrize("out", ["x.tar", "train-{000000..000003}.tar"])
def test_most_of_the_samples_may_go_to_validation(tmp_path, animals, out):
    made = packed(animals, tmp_path, out, val_fraction=0.8)
    assert made["samples"] == {"train": 6, "val": 25}
    assert not set(made["train"]) & set(made["val"])
    assert sum(labels_in(*made["val"]).values()) == 25


def test_small_classes_are_validated_too(tmp_path):
    folder = class_folders(tmp_path / "f", {"a": 4, "b": 4, "c": 1})
    made = packed(folder, tmp_path / "out", val_fraction=0.1)
    assert labels_in(*made["val"]) == {0: 1, 1: 1}
    assert labels_in(*made["train"]) == {0: 3, 1: 3, 2: 1}


def test_a_validation_part_without_samples_is_refused(tmp_path):
    folder = class_folders(tmp_path / "f", {"a": 1, "b": 1})
    with pytest.raises(UserError, match=r"--val-fraction 0\.1: no class has two samples"):
        packed(folder, tmp_path / "out", val_fraction=0.1)
    assert not (tmp_path / "out").exists()


def test_no_class_goes_to_validation_or_out_of_training_altogether(tmp_path):
    folder = class_folders(tmp_path / "f", {"a": 1, "b": 2, "c": 30})
    made = packed(folder, tmp_path / "out", val_fraction=0.999)
    assert labels_in(*made["train"]) == {0: 1, 1: 1, 2: 1}
    assert labels_in(*packed(folder, tmp_path / "few", fraction=0.01)["train"]) == {0: 1, 1: 1, 2: 1}


def test_hidden_files_are_no_samples(tmp_path):
    folder = class_folders(tmp_path / "f", {"a": 2, "b": 2})
    (folder / "a" / ".ipynb_checkpoints").mkdir()
    for name in (".ipynb_checkpoints/x.png", "._x.png"):
        (folder / "a" / name).write_bytes(next((folder / "b").iterdir()).read_bytes())
    assert labels_in(*packed(folder, tmp_path / "out")["train"]) == {0: 2, 1: 2}


# ---------------------------------------------------------------------------------------------- keys


def test_keys_that_several_shards_share_are_made_distinct(tmp_path):
    shards = [write_tar(tmp_path / f"{i}.tar", [*sample("a", 2 * i), *sample("b", 2 * i + 1)]) for i in (0, 1)]
    made = packed(shards, tmp_path / "out", "x.tar", shuffle=False)
    assert keys_in(*made["train"]) == ["000000_a", "000000_b", "000001_a", "000001_b"]
    assert digests_in(*made["train"]) == digests_in(*shards)


def test_files_whose_names_make_one_key_are_all_kept(tmp_path):
    names = ["a/x.jpg", "a/x.png", "a/x-2.png", "a/x-2.webp", "a/x_y.png", "a/x.y.png", "a/x y.png"]
    names += ["a_x/y.png", "a/b/c.png", "a/b_c.png"]
    for number, name in enumerate(names):
        (tmp_path / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        formats = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
        (tmp_path / "f" / name).write_bytes(picture(number, formats[name.rpartition(".")[2]]))
    made = packed(tmp_path / "f", tmp_path / "out", "x.tar")
    assert len(set(keys_in(*made["train"]))) == len(names)
    assert len(set(digests_in(*made["train"]))) == len(names)
    assert by_us(*made["train"]) == by_webdataset(*made["train"])


# ---------------------------------------------------------------------------------------------- repacking


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_tars_are_repacked(tmp_path, mode):
    path = write_tar(tmp_path / "x.tar.z", samples(9), mode=mode)
    made = packed([path], tmp_path / "out", shuffle=False)
    assert by_us(*made["train"]) == by_webdataset(path) == by_webdataset(*made["train"])


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
    with pytest.raises(UserError, match=r"decompress it first: zstd -d .*x\.tar\.zst"):
        packed([str(tmp_path / "x.tar.zst")], tmp_path / "out")


def test_members_that_stand_apart_are_brought_together(tmp_path):
    members = samples(5)
    apart = [m for m in members if m[0].endswith("cls")] + [m for m in members if m[0].endswith("png")]
    made = packed([write_tar(tmp_path / "x.tar", apart)], tmp_path / "out", shuffle=False)
    assert by_us(*made["train"]) == by_us(write_tar(tmp_path / "y.tar", members))


def test_a_folder_of_tars_is_packed_too(tmp_path):
    shards = [write_tar(tmp_path / "my [x] {y}" / f"{i}.tar", samples(3, first=3 * i)) for i in range(2)]
    made = packed(tmp_path / "my [x] {y}", tmp_path / "out", shuffle=False)
    assert keys_in(*made["train"]) == keys_in(*shards)


def test_a_folder_beside_other_sources_is_refused_or_packed_with_them(tmp_path):
    shards = [write_tar(tmp_path / f"{i}" / "x.tar", samples(3, first=3 * i)) for i in range(2)]
    try:
        made = packed([str(tmp_path / "0"), shards[1]], tmp_path / "out", shuffle=False)
    except UserError as error:
        assert "folder" in str(error)  # noqa: PT017
    else:
        assert keys_in(*made["train"]) == keys_in(*shards)


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
    for there in [*made["train"], *made["val"]]:
        name = Path(there).name
        with pytest.raises(UserError, match=rf"{name}: is there already"):
            packed(animals, tmp_path, val_fraction=0.2, seed=1)
        (tmp_path / name).unlink()
        del before[tmp_path / name]
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_class_list_beside_the_new_shards_is_refused(tmp_path, animals):
    packed(animals, tmp_path / "out")
    other = class_folders(tmp_path / "f", {"dog": 2, "cat": 2})
    for source in (other, write_tar(tmp_path / "no classes here" / "x.tar", samples(2))):
        with pytest.raises(UserError, match=r"classes\.json: is there already"):
            packed([str(source)], tmp_path / "out", "y.tar")
    assert packed(animals, tmp_path / "out", "z-{0..1}.tar")["samples"] == {"train": 31}  # the same list is no conflict
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["cat", "dog", "eel"]


def test_a_failure_leaves_no_half_shard(tmp_path):
    path = write_tar(tmp_path / "x.tar", [*sample("a", 0), ("b.cls", b"0")])
    with pytest.raises(UserError, match=r"x\.tar: key 'b' needs one image"):
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
        ("x.tar", {"fraction": 0}, "--fraction"),
        ("x.tar", {"fraction": 1.01}, "--fraction"),
        ("x.tar", {"val_fraction": 1}, "--val-fraction"),
        ("x.tar", {"val_fraction": -0.1}, "--val-fraction"),
        ("x-{0..2}.tar", {"per_shard": 10}, "widen the braces"),
        ("x.tar", {"per_shard": 0}, "--per-shard"),
        ("x.tar", {"per_shard": -1}, "--per-shard"),
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
    again = packed(once["train"], tmp_path / "b", "y-{0..2}.tar", seed=5)
    assert sorted(by_us(*again["train"])) == sorted(by_us(*once["train"]))
    assert again["classes"] == once["classes"]
    assert cached_index(again["train"][0]) == build_index(again["train"][0])


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
    for part in ("train", "val"):
        assert [Path(p).read_bytes() for p in one[part]] == [Path(p).read_bytes() for p in two[part]]
    assert (one["samples"], one["classes"]) == (two["samples"], two["classes"])
    assert by_us(*two["train"], *two["val"]) == by_webdataset(*two["train"], *two["val"])


@pytest.mark.parametrize("labelled", [True, False])
def test_webdataset_yields_what_we_read_of_packed_lists(tmp_path, labelled):
    formats = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP", "JPG": "JPEG"}
    rows = []
    for number, (kind, name) in enumerate(formats.items()):
        (tmp_path / f"{number}.{kind}").write_bytes(picture(number, name))
        rows.append(f"{number}.{kind},{number % 2}" if labelled else f"{number}.{kind}")
    source = listing(tmp_path, "\n".join(["path,label" if labelled else "path", *rows]))
    made = packed(source, tmp_path / "out")
    assert by_us(*made["train"]) == by_webdataset(*made["train"])
    assert labels_in(*made["train"]) == ({0: 3, 1: 2} if labelled else {None: 5})
    assert {kind for _, members in by_us(*made["train"]) for kind in members} == {
        "png", "jpg", "jpeg", "webp", *(["cls"] if labelled else [])
    }  # fmt: skip


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
    said = []
    listed(tmp_path)
    made = packed(listing(tmp_path, text), tmp_path / "out", shuffle=False, say=said.append)
    expected = [("0", {"png": picture(0), "cls": b"1"}), ("1", {"png": picture(1), "cls": b"0"})]
    assert by_us(*made["train"]) == [*expected, ("2", {"png": picture(2), "cls": b"1"})]
    assert made["classes"] == ["a", "b"]
    notes = [line for line in said if "other columns" in line]
    assert [note.rpartition(": ")[2] for note in notes] == (["id, split, note"] if "split" in text else [])


def test_a_list_without_labels_is_said_to_be_one(tmp_path):
    said = []
    listed(tmp_path)
    made = packed(listing(tmp_path, "path,lable\n0.png,a\n"), tmp_path / "out", "x.tar", say=said.append)
    assert any(line.endswith("no column is called label, so the shards have no labels") for line in said)
    assert made["classes"] is None


def test_odd_names_and_labels_go_between_quotes(tmp_path):
    for number, name in enumerate(['a,"b".png', "ü ö.png", " x.png"]):
        (tmp_path / name).write_bytes(picture(number))
    text = 'path,label\n"a,""b"".png","cat, ""wild"""\nü ö.png,"dog"\n" x.png",ü\n'
    made = packed(listing(tmp_path, text), tmp_path / "out", "x.tar", shuffle=False)
    assert made["classes"] == ['cat, "wild"', "dog", "ü"]
    assert [members["png"] for _, members in by_us(*made["train"])] == [picture(i) for i in range(3)]
    assert by_us(*made["train"]) == by_webdataset(*made["train"])


def test_paths_are_relative_to_the_list_or_absolute_and_keys_are_as_in_folders(tmp_path, monkeypatch):
    names = ["l/sub/a.png", "l/sub/a.b.png", "l/sub/a_b.png", "other/c.png", "l/.d.png"]
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture(number))
    rows = ["sub/a.png", f"{tmp_path}/l/sub/a.b.png", "./sub//a_b.png", "../other/c.png", ".d.png"]
    source = listing(tmp_path / "l", "\n".join(["path", *rows]))
    made = packed(source, tmp_path / "out", "x.tar", shuffle=False)
    assert keys_in(*made["train"]) == ["sub_a", "sub_a_b", "sub_a_b-2", "other_c", "_d"]
    assert [members["png"] for _, members in by_us(*made["train"])] == [picture(i) for i in range(5)]
    monkeypatch.chdir(tmp_path / "l")
    again = packed("list.csv", tmp_path / "again", "x.tar", shuffle=False)
    assert Path(again["train"][0]).read_bytes() == Path(made["train"][0]).read_bytes()


def test_labels_from_zero_on_are_the_numbers_themselves(tmp_path):
    rows = [f"{i}.png,{label}" for i, label in enumerate([10, 2, *range(11)])]
    said = []
    made = packed(listed(tmp_path, *rows, count=13), tmp_path / "out", shuffle=False, say=said.append)
    assert [int(members["cls"]) for _, members in by_us(*made["train"])] == [10, 2, *range(11)]
    assert made["classes"] == [str(i) for i in range(11)]  # and not 0, 1, 10, 2, …
    assert not any("names" in line for line in said)


@pytest.mark.parametrize(
    "labels", [["1", "2", "3", "10"], ["0", "1", "3", "7"], ["-1", "0", "1", "2"], ["01", "00", "2", "3"]]
)
def test_other_numbers_are_names_and_this_is_said(tmp_path, labels):
    said = []
    made = packed(listed(tmp_path, *(f"{i}.png,{label}" for i, label in enumerate(labels))), tmp_path / "out",
                  shuffle=False, say=said.append)  # fmt: skip
    assert made["classes"] == sorted(labels)
    assert [made["classes"][int(members["cls"])] for _, members in by_us(*made["train"])] == labels
    assert any("they count as names" in line for line in said)


def test_classes_beside_a_list_name_its_numbers(tmp_path):
    source = listed(tmp_path, "0.png,2", "1.png,0", "2.png,2")
    (tmp_path / "classes.json").write_text('["cat", "dog", "eel", "fox"]')
    made = packed(source, tmp_path / "out", "x.tar", shuffle=False)
    assert made["classes"] == ["cat", "dog", "eel", "fox"]
    assert [int(members["cls"]) for _, members in by_us(*made["train"])] == [2, 0, 2]
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == made["classes"]


def test_classes_beside_a_list_number_its_names(tmp_path):
    source = listed(tmp_path, "0.png,eel", "1.png,cat")
    (tmp_path / "classes.json").write_text('["eel", "dog", "cat"]')
    made = packed(source, tmp_path / "out", "x.tar", shuffle=False)
    assert made["classes"] == ["eel", "dog", "cat"]
    assert [int(members["cls"]) for _, members in by_us(*made["train"])] == [0, 2]


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
    assert made["classes"] is None
    assert made["samples"] == {"train": 2, "val": 2}
    assert labels_in(*made["train"], *made["val"]) == {None: 4}
    assert not (tmp_path / "out" / "classes.json").exists()


def test_the_classes_beside_a_list_stay_as_they_are_when_shards_come_beside_it(tmp_path):
    source = listed(tmp_path, "0.png,a", "1.png,b")
    (tmp_path / "classes.json").write_text('["a",\n"b"]')
    packed(source, tmp_path, "x.tar")
    assert (tmp_path / "classes.json").read_text() == '["a",\n"b"]'


BAD_LISTS = {
    "empty": ("", r"line 1: .* the file is empty, expected\n  path,label\n  cats/1\.jpg,cat"),
    "only a mark": ("\ufeff", r"line 1: "),
    "no header": ("0.png,a\n1.png,b\n", r"line 1: .* names the columns; found '0\.png,a', expected\n  path"),
    "other separators": ("path;label\n0.png;a\n", r"line 1: .*found 'path;label'"),
    "no path column": ("file,label\n0.png,a\n", r"line 1: .*found 'file,label'"),
    "a column twice": ("path,label,label\n0.png,a,b\n", r"line 1: .*found 'path,label,label'"),
    "only a header": ("path,label\n\n", r"list\.csv: no images in it"),
    "no path": ("path,label\n0.png,a\n,b\n", r"line 3: no path in it; give one or remove the line"),
    "no label": ("path,label\n0.png,a\n\n1.png,\n", r"line 4: no label in it; label every row, or leave"),
    "a short row": ("path,label\n0.png\n", r"line 2: no label in it"),
    "too many fields": ("path,label\n0.png,a,b\n", r"line 2: 3 fields, but the header names 2"),
    "a file that is not there": ("path,label\n0.png,a\nx/9.png,b\n", r"line 3: there is no file .*x/9\.png; paths are"),
    "a folder": ("path\nfolder.png\n", r"line 2: there is no file .*folder\.png"),
    "a name too long": ("path\n" + "x" * 5000 + ".png\n", r"line 2: 'xxx.* cannot be opened: File name too long"),
    "no image": ("path\nlist.csv\n", r"line 2: 'list\.csv' is no image that is read; expected one of jpg, jpeg"),
    "twice": ("path,label\n0.png,a\n1.png,b\n./0.png,a\n", r"line 4: '\./0\.png' is there already, in line 2"),
    "not UTF-8": (b"path,label\n0.png,a\n1.png,caf\xe9\n", r"line 3: not UTF-8 .*; save the list as UTF-8"),
    "UTF-16": ("path,label\n0.png,a\n".encode("utf-16"), r"line 1: (a NUL byte|not UTF-8)"),
    "a NUL": (b"path,label\n0.png,a\n1.png\0,b\n", r"line 3: a NUL byte in it"),
    "an open quote": ('path,label\n0.png,a\n"1.png,b\n2.png,c\n', r"line 4: not CSV: .*; expected lines such as\n"),
    "text after a quote": ('path,label\n"0.png"x,a\n', r"line 2: not CSV: "),
    "a field too long": ("path,label\n0.png," + "a" * 200_000, r"line 2: not CSV: .*field limit"),
    "lines of old Macs": ("path,label\r0.png,a\r1.png,b\r", r"line 1: not CSV: "),
}  # fmt: skip


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
        assert packed(source, tmp_path / "out")["samples"] == {"train": 24}
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
