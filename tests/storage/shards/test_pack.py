"""Pack: nothing is lost, nothing is doubled, the order is the seed's, and every class is in its part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from storage.errors import UserError
from storage.shards.index import build_index
from storage.testing import synthetic_shards
from tests.storage.helpers import (
    by_us,
    by_webdataset,
    class_folders,
    digests_in,
    keys_in,
    labels_in,
    packed,
    picture,
    sample,
    samples,
    write_tar,
)

# ---------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_webdataset_yields_what_we_read_of_packed_folders(tmp_path, kind):
    made = packed(class_folders(tmp_path / "f", {"a": 3, "b": 2}, kind), tmp_path / "out")
    ours = by_us(*made.train)
    assert ours == by_webdataset(*made.train)
    assert sorted(key for key, _ in ours) == ["a_000", "a_001", "a_002", "b_000", "b_001"]
    written = {(tmp_path / "f").joinpath(*key.split("_")).with_suffix(f".{kind}").read_bytes() for key, _ in ours}
    assert {members[kind] for _, members in ours} == written


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_webdataset_yields_what_we_read_of_packed_shards(tmp_path, kind):
    sources = synthetic_shards(tmp_path / "in", shards=3, samples=7, size=(8, 8), kind=kind)
    made = packed(sources, tmp_path / "out")
    assert by_us(*made.train) == by_webdataset(*made.train)
    assert sorted(by_us(*made.train)) == sorted(by_us(*sources))
    assert made.samples == {"train": 21}


def test_other_members_and_odd_labels_stay_as_they_are(tmp_path):
    members = [("a.json", b'{"x": 1}'), ("a.cls", b" 2\n"), ("a.txt", b"a cat"), ("a.png", picture(0)), *sample("b", 1)]
    path = write_tar(tmp_path / "x.tar", members)
    made = packed([path], tmp_path / "out", "y.tar", shuffle=False)
    assert by_webdataset(*made.train) == by_webdataset(path)


def test_unlabeled_shards_stay_unlabeled(tmp_path):
    made = packed(synthetic_shards(tmp_path / "in", samples=5, size=(8, 8), labels=False), tmp_path / "out")
    assert labels_in(*made.train) == {None: 10}


def test_labels_are_the_places_of_the_classes_in_their_list(tmp_path, animals):
    made = packed(animals, tmp_path)
    assert made.classes == ["cat", "dog", "eel"]
    assert json.loads((tmp_path / "classes.json").read_text()) == made.classes
    assert labels_in(*made.train) == {0: 17, 1: 10, 2: 4}
    assert all(key.startswith(made.classes[int(members["cls"])]) for key, members in by_us(*made.train))


def test_class_lists_of_shards_come_along(tmp_path):
    made = packed(synthetic_shards(tmp_path / "in", samples=5, size=(8, 8)), tmp_path / "out")
    assert made.classes == ["class0", "class1", "class2"]
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == made.classes


def test_class_folders_are_searched_deep_and_names_may_be_long_or_odd(tmp_path):
    names = ["a/deep/er/1.png", "a/ü ö.v2.PNG", "a/" + "long " * 20 + "/" + "y" * 120 + ".png", "b/1.png"]
    for number, name in enumerate(names):
        (tmp_path / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "f" / name).write_bytes(picture(number))
    (tmp_path / "f" / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "f" / ".hidden").mkdir()
    made = packed(tmp_path / "f", tmp_path / "out", shuffle=False)
    assert made.classes == ["a", "b"]
    assert by_us(*made.train) == by_webdataset(*made.train)
    assert {members["png"] for _, members in by_us(*made.train)} == {picture(i) for i in range(4)}


# ---------------------------------------------------------------------------------------------- order and parts


def test_the_same_seed_gives_the_same_bytes(tmp_path, animals):
    one, two = (packed(animals, tmp_path / name, seed=3).train for name in ("a", "b"))
    assert [Path(p).read_bytes() for p in one] == [Path(p).read_bytes() for p in two]


def test_another_seed_gives_another_order_of_the_same_samples(tmp_path, animals):
    keys = [keys_in(*packed(animals, tmp_path / str(seed), seed=seed).train) for seed in (0, 1)]
    assert keys[0] != keys[1]
    assert sorted(keys[0]) == sorted(keys[1])
    assert sorted(keys[0]) != keys[0]


def test_without_shuffling_the_order_of_the_source_stays(tmp_path, animals):
    keys = keys_in(*packed(animals, tmp_path / "a", shuffle=False).train)
    assert keys == sorted(keys)
    shards = [write_tar(tmp_path / f"{i}.tar", samples(4, first=i * 4)) for i in (1, 0)]
    assert keys_in(*packed(shards, tmp_path / "b", shuffle=False).train) == keys_in(*shards)


def test_shuffling_goes_over_all_shards(tmp_path):
    shards = [write_tar(tmp_path / f"{i}.tar", samples(32, first=i * 32)) for i in range(2)]
    made = packed(shards, tmp_path / "out").train
    from_first = sum(key < "s032" for key in keys_in(made[0]))
    assert 8 <= from_first <= 24


def test_samples_are_spread_evenly_over_the_names(tmp_path, animals):
    made = packed(animals, tmp_path, "x-{0..6}.tar")
    counts = [len(build_index(path)) for path in made.train]
    assert sum(counts) == 31
    assert max(counts) - min(counts) <= 1
    assert made.train == [str(tmp_path / f"x-{i}.tar") for i in range(7)]


def test_per_shard_uses_as_many_names_as_it_needs(tmp_path, animals):
    made = packed(animals, tmp_path, "x-{0..6}.tar", per_shard=8)
    assert [len(build_index(path)) for path in made.train] == [8, 8, 8, 7]
    assert sorted(p.name for p in tmp_path.glob("*.tar")) == ["x-0.tar", "x-1.tar", "x-2.tar", "x-3.tar"]


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.999])
def test_a_fraction_is_balanced_over_the_classes(tmp_path, animals, fraction):
    made = packed(animals, tmp_path, fraction=fraction)
    assert labels_in(*made.train) == {i: max(1, round(n * fraction)) for i, n in enumerate([17, 10, 4])}


def test_a_fraction_of_a_whole_number_is_not_one_more(tmp_path):
    assert 25 * 0.28 > 7
    folder = class_folders(tmp_path / "f", {"a": 25, "b": 50})
    assert labels_in(*packed(folder, tmp_path / "out", fraction=0.28).train) == {0: 7, 1: 14}


def test_validation_is_disjoint_and_together_they_are_complete(tmp_path, animals):
    made = packed(animals, tmp_path, val_fraction=0.25)
    train, val = digests_in(*made.train), digests_in(*made.val)
    assert not set(train) & set(val)
    assert sorted(train + val) == sorted(digests_in(*packed(animals, tmp_path / "all").train))
    assert labels_in(*made.val) == {0: 4, 1: 2, 2: 1}
    assert made.samples == {"train": 24, "val": 7}
    assert [Path(path).name for path in made.val] == ["x-val-000000.tar"]
    assert by_us(*made.val) == by_webdataset(*made.val)


def test_a_fraction_leaves_the_validation_samples_what_they_are(tmp_path, animals):
    whole = packed(animals, tmp_path / "a", val_fraction=0.25)
    part = packed(animals, tmp_path / "b", val_fraction=0.25, fraction=0.5)
    assert set(digests_in(*part.val)) == set(digests_in(*whole.val))
    assert set(digests_in(*part.train)) < set(digests_in(*whole.train))


def test_the_choice_of_validation_samples_is_the_seeds(tmp_path, animals):
    chosen = [set(digests_in(*packed(animals, tmp_path / str(s), val_fraction=0.5, seed=s).val)) for s in (0, 1)]
    assert chosen[0] != chosen[1]


@pytest.mark.parametrize("out", ["x.tar", "train-{000000..000003}.tar"])
def test_most_of_the_samples_may_go_to_validation(tmp_path, animals, out):
    made = packed(animals, tmp_path, out, val_fraction=0.8)
    assert made.samples == {"train": 6, "val": 25}
    assert not set(made.train) & set(made.val)
    assert sum(labels_in(*made.val).values()) == 25


def test_small_classes_are_validated_too(tmp_path):
    folder = class_folders(tmp_path / "f", {"a": 4, "b": 4, "c": 1})
    made = packed(folder, tmp_path / "out", val_fraction=0.1)
    assert labels_in(*made.val) == {0: 1, 1: 1}
    assert labels_in(*made.train) == {0: 3, 1: 3, 2: 1}


def test_a_validation_part_without_samples_is_refused(tmp_path):
    folder = class_folders(tmp_path / "f", {"a": 1, "b": 1})
    with pytest.raises(UserError, match=r"`val_fraction=0\.1`: no class has two samples"):
        packed(folder, tmp_path / "out", val_fraction=0.1)
    assert not (tmp_path / "out").exists()


def test_no_class_goes_to_validation_or_out_of_training_altogether(tmp_path):
    folder = class_folders(tmp_path / "f", {"a": 1, "b": 2, "c": 30})
    made = packed(folder, tmp_path / "out", val_fraction=0.999)
    assert labels_in(*made.train) == {0: 1, 1: 1, 2: 1}
    assert labels_in(*packed(folder, tmp_path / "few", fraction=0.01).train) == {0: 1, 1: 1, 2: 1}


def test_hidden_files_are_no_samples(tmp_path):
    folder = class_folders(tmp_path / "f", {"a": 2, "b": 2})
    (folder / "a" / ".ipynb_checkpoints").mkdir()
    for name in (".ipynb_checkpoints/x.png", "._x.png"):
        (folder / "a" / name).write_bytes(next((folder / "b").iterdir()).read_bytes())
    assert labels_in(*packed(folder, tmp_path / "out").train) == {0: 2, 1: 2}


# ---------------------------------------------------------------------------------------------- keys


def test_keys_that_several_shards_share_are_made_distinct(tmp_path):
    shards = [write_tar(tmp_path / f"{i}.tar", [*sample("a", 2 * i), *sample("b", 2 * i + 1)]) for i in (0, 1)]
    made = packed(shards, tmp_path / "out", "x.tar", shuffle=False)
    assert keys_in(*made.train) == ["000000_a", "000000_b", "000001_a", "000001_b"]
    assert digests_in(*made.train) == digests_in(*shards)


def test_files_whose_names_make_one_key_are_all_kept(tmp_path):
    names = ["a/x.jpg", "a/x.png", "a/x-2.png", "a/x-2.webp", "a/x_y.png", "a/x.y.png", "a/x y.png"]
    names += ["a_x/y.png", "a/b/c.png", "a/b_c.png"]
    for number, name in enumerate(names):
        (tmp_path / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        formats = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
        (tmp_path / "f" / name).write_bytes(picture(number, formats[name.rpartition(".")[2]]))
    made = packed(tmp_path / "f", tmp_path / "out", "x.tar")
    assert len(set(keys_in(*made.train))) == len(names)
    assert len(set(digests_in(*made.train))) == len(names)
    assert by_us(*made.train) == by_webdataset(*made.train)
