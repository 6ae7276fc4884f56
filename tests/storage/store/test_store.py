"""The store: opened or refused, its manifests and shards known by their identity, its views replayed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import DamageError, IdentityError, UserError, did_you_mean
from storage.objects import json_record
from storage.objects.object_store import LocalObjectStore, open_object_store
from storage.shards.index import build_index, read_samples
from storage.store.attempts import Attempt
from storage.store.banks import bank_manifest, bank_policy, read_views
from storage.store.card import card
from storage.store.manifests import BankIdentity, BankManifest, TargetManifest, TeacherManifest
from storage.store.markers import Task
from storage.store.store import Store
from storage.views.policy import OPERATIONS_VERSION, policy
from storage.views.view import View
from tests.storage.helpers import SmallStore, decoded, files_of, sample, samples, write_tar

# ---------------------------------------------------------------------------------------------- replay


def test_views_replay_as_they_were_recorded(world):
    store = Store.open(world.store)
    for url in world.shards:
        shard = store.require(url, store.shard_ids())
        for task in sorted(t for t in store.done() if t.kind == "bank" and t.shard == shard.id):
            policy = bank_policy(store, task.id)
            views = read_views(store.marker(task), 60, 75)
            for i, found in enumerate(shard.read(range(60, 75)), 60):
                pixels = views.replay(i, found, found.image, policy.size, url)
                assert pixels.shape == (32, 32, 3)


def test_another_image_or_renderer_is_named_at_replay(kept):
    small, _ = kept
    index, url = small.indexes[0], small.shards[0]
    marker = small.store.marker(Task("bank", small.policy.bank, index.id, 0))
    views = read_views(marker, 0, 2)
    originals = read_samples(url, index, range(2))
    with pytest.raises(IdentityError) as error:
        views.replay(0, originals[0], originals[1].image, 8, url)
    assert error.value.field == "signature of the view's pixels"
    assert error.value.expected == f"{int(views.signatures[0]):08x}"
    assert originals[0].key in str(error.value)
    assert "same versions" in str(error.value)
    with pytest.raises(IdentityError, match=r"pillow 1\.0/"):
        dataclasses.replace(views, renderer={**views.renderer, "pillow": "1.0"}).replay(
            0, originals[0], originals[1].image, 8, url
        )
    assert isinstance(views.view(1), View)


def test_a_bank_whose_views_need_newer_operations_says_so(small):
    line = policy("light", 16)
    identity = BankIdentity.model_validate({**line.identity, "operations": OPERATIONS_VERSION + 1})
    id = f"light-{identity.digest[:8]}"
    small.store.add(bank_manifest(line).model_copy(update={"id": id, "identity": identity}))
    with pytest.raises(UserError, match=rf"bank {id}: its views need a newer version"):
        bank_policy(small.store, id)


def test_a_bank_whose_manifest_is_anothers_is_damage(small):
    manifest = small.store.bank(small.policy.bank).plain()
    other = {**manifest, "identity": {**manifest["identity"], "size": 9}}
    small.store.objects.put(f"banks/{small.policy.bank}/manifest.json", json_record.to_json(other))
    with pytest.raises(DamageError, match=r"manifest\.json: damaged"):
        bank_policy(small.store, small.policy.bank)


# ---------------------------------------------------------------------------------------------- opening


@pytest.mark.parametrize("place", ["folder", "memory"])
def test_a_new_store_is_opened_again(tmp_path, place):
    where = tmp_path / "a" / "store" if place == "folder" else f"memory://{uuid.uuid4().hex}/store"
    with pytest.raises(UserError, match="no store here"):
        Store.open(where)
    created = Store.create(where)
    assert Store.open(where).url == Store.create(where).url == created.url == pickle.loads(pickle.dumps(created)).url
    assert (created.banks(), created.teachers(), created.targets(), created.shard_ids()) == ({}, {}, {}, [])
    assert created.done() == set()


def test_what_is_no_store_is_a_clear_error(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "photo.png").write_text("x")
    (tmp_path / "zarr").mkdir()
    zarr.create_group(str(tmp_path / "zarr"))
    for name, message in (
        ("empty", "no store here"),
        ("other", "no store here"),
        ("nowhere", "no store here"),
        ("file", "not a folder"),
        ("zarr", "not the root of a store"),
    ):
        with pytest.raises(UserError, match=message) as error:
            Store.open(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)
    for name in ("other", "file", "zarr"):
        before = files_of(tmp_path)
        with pytest.raises(UserError) as error:
            Store.create(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)
        assert files_of(tmp_path) == before


def test_a_newer_format_is_said_to_be_one(tmp_path):
    store = Store.create(tmp_path)
    root = store.objects.get("zarr.json")
    store.objects.put("zarr.json", root.replace(b'"format":1', b'"format":12'))
    for look in (Store.open, Store.create):
        with pytest.raises(UserError, match=r"format 12, this version reads 1\n  Install a newer version") as error:
            look(tmp_path)
        assert not isinstance(error.value, DamageError)


def test_a_store_whose_root_is_gone_is_damage(small):
    small.store.objects.remove("zarr.json")
    for look in (Store.open, Store.create):
        with pytest.raises(DamageError, match=r"zarr\.json: missing"):
            look(small.store.url)


def test_two_that_create_a_store_at_once_share_it(tmp_path):
    class Late(LocalObjectStore):
        """Looks just before another process creates the store."""

        looked = False

        def get(self, key: str) -> bytes:
            if not self.looked:
                self.looked = True
                Store.create(self.url)
                raise FileNotFoundError(key)
            return super().get(key)

    assert Store.create(Late(tmp_path / "store")).url == str(tmp_path / "store")
    with ThreadPoolExecutor(8) as threads:
        stores = list(threads.map(Store.create, [tmp_path / "racing"] * 8))
    assert {store.url for store in stores} == {str(tmp_path / "racing")}


def test_a_store_may_be_in_memory(tmp_path):
    place = f"memory://{uuid.uuid4().hex}"
    shard = f"{place}/data/x.tar"
    open_object_store(f"{place}/data").put("x.tar", Path(write_tar(tmp_path / "x.tar", samples(10))).read_bytes())
    small = SmallStore(f"{place}/store", [shard], views=2)
    values = small.add_target("t", "f32")
    again = Store.open(f"{place}/store")
    assert {task for task in again.done() if task.kind == "target"} == set(values)
    for task, expected in values.items():
        assert np.array_equal(decoded(again, task, "f32"), expected)
    assert again.require(shard, again.shard_ids()).index == small.indexes[0]
    assert np.array_equal(again.array("t").compute(), np.concatenate([values[task] for task in sorted(values)]))
    assert again.views("target", "t", again.shard_ids(), again.done()) == 2
    assert "| t |" in card(again)


# ---------------------------------------------------------------------------------------------- manifests

IDENTITY = {
    "model": "resnet10t",
    "arguments": {},
    "weights sha256": "a" * 64,
    "input size": 64,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
}
ABOUT = {"weights": "timm hub", "classes": None, "parameters": 1, "network": "cnn", "layers": 4}


def teacher(**changes: Any) -> TeacherManifest:
    content = {"format": 1, "kind": "teacher", "id": "cnn", "identity": IDENTITY, **ABOUT, **changes}
    return TeacherManifest.model_validate(content)


def test_another_teacher_under_a_known_name_is_refused(small):
    first = small.store.add(teacher())
    assert small.store.add(teacher(layers=99)) == first == small.store.teachers()["cnn"]
    for field, value in (("weights sha256", "b" * 64), ("input size", 32), ("arguments", {"in_chans": 1}), ("new", 1)):
        before = files_of(small.store.objects.root)
        with pytest.raises(IdentityError) as error:
            small.store.add(teacher(identity={**IDENTITY, field: value}))
        assert (error.value.field, error.value.expected, error.value.found) == (field, IDENTITY.get(field), value)
        assert "`teacher_name=cnn-2`" in str(error.value)
        assert "teacher 'cnn'" in str(error.value)
        assert files_of(small.store.objects.root) == before


def test_a_target_or_bank_with_another_identity_under_its_id_is_refused(small):
    f32 = small.store.target("t").identity.model_copy(update={"codec": "f32"})
    with pytest.raises(IdentityError) as error:
        small.store.require_same(TargetManifest, "t", f32)
    assert (error.value.field, error.value.expected, error.value.found) == ("codec", "u8", "f32")
    seeded = BankIdentity.model_validate({**small.policy.identity, "seed": 1})
    with pytest.raises(IdentityError, match="seed: expected 0, found 1"):
        small.store.require_same(BankManifest, small.policy.bank, seeded)


def test_an_unknown_target_names_the_nearest(small):
    with pytest.raises(UserError, match=r"no target is called 'tt'\n  Did you mean 't'"):
        small.store.target("tt")


def test_adding_a_target_or_teacher_touches_nothing_that_is_there(small, tmp_path):
    root = small.store.objects.root
    before = files_of(root)
    small.add_target("another", "f16")
    small.store.add(teacher())
    (tmp_path / "graph.onnx").write_bytes(b"graph")
    small.store.add_graph("cnn", tmp_path / "graph.onnx")
    small.store.add_index(small.indexes[0], small.shards[0])
    after = files_of(root)
    assert {path: after[path] for path in before} == before
    assert len(after) > len(before)
    assert np.array_equal(
        decoded(small.store, min(small.values), "u8"), decoded(Store.open(root), min(small.values), "u8")
    )


def test_graphs_are_kept_under_their_digest(small, tmp_path):
    files = tmp_path / "one.onnx", tmp_path / "another.onnx"
    for file in files:
        file.write_bytes(file.name.encode())
    digest = small.store.add_graph("cnn", files[0])
    assert digest == hashlib.sha256(b"one.onnx").hexdigest()
    assert small.store.add_graph("cnn", files[0]) == digest
    assert small.store.graph("cnn", digest).read_bytes() == b"one.onnx"
    assert small.store.add_graph("cnn", files[1]) != digest


# ---------------------------------------------------------------------------------------------- shards


def test_a_known_shard_is_recognized_wherever_it_lies(small, tmp_path):
    copy = tmp_path / "elsewhere" / Path(small.shards[0]).name
    copy.parent.mkdir()
    copy.write_bytes(Path(small.shards[0]).read_bytes())
    assert small.store.require(str(copy), small.store.shard_ids()).index == small.indexes[0]
    assert small.store.index(small.indexes[0].id) == small.indexes[0]


def test_two_shards_of_one_name_are_told_apart(tmp_path):
    paths = [write_tar(tmp_path / folder / "000000.tar", samples(5, first=i * 5)) for i, folder in enumerate("ab")]
    small = SmallStore(tmp_path / "store", paths)
    assert len(small.store.shard_ids()) == 2
    for path, index in zip(paths, small.indexes, strict=True):
        assert small.store.require(path, small.store.shard_ids()).index == index


def test_the_same_samples_in_a_tar_with_other_headers_are_known(tmp_path):
    members = samples(5)
    small = SmallStore(tmp_path / "store", [write_tar(tmp_path / "a" / "x.tar", members)])
    other = write_tar(tmp_path / "b" / "x.tar", members, mtime=99)
    shard = small.store.require(other, small.store.shard_ids())
    assert shard.index == build_index(other)
    assert shard.id == small.indexes[0].id
    assert [s.key for s in shard.read(range(5))] == list(small.indexes[0].keys)


def test_other_labels_than_the_stores_are_refused_whatever_the_headers(tmp_path):
    small = SmallStore(tmp_path / "store", [write_tar(tmp_path / "a" / "x.tar", samples(5))])
    for number, members in enumerate(
        [
            [(n, b"8") if n == "s002.cls" else (n, d) for n, d in samples(5)],
            [(n, d) for n, d in samples(5) if n != "s002.cls"],
        ]
    ):
        other = write_tar(tmp_path / str(number) / "x.tar", members, mtime=99)
        with pytest.raises(IdentityError) as error:
            small.store.require(other, small.store.shard_ids())
        assert error.value.field == "label of key s002"
        assert (error.value.expected, error.value.found) == (2, [8, None][number])


def test_an_unknown_shard_counts_the_images_that_are_known(tmp_path):
    small = SmallStore(tmp_path / "store", [write_tar(tmp_path / f"x{i}.tar", samples(5, first=5 * i)) for i in (0, 1)])
    mixed = [*sample("n0", 3), *sample("n1", 7), *sample("n2", 50), *sample("n3", 9)]
    other = write_tar(tmp_path / "other.tar", mixed)
    with pytest.raises(IdentityError, match="3 of its 4 images are known") as error:
        small.store.require(other, small.store.shard_ids())
    assert error.value.field == "shard"
    assert error.value.found == build_index(other).id
    assert small.indexes[0].id in str(error.value.expected)


def test_a_known_name_with_other_content_names_the_first_difference(tmp_path):
    members = samples(5)
    small = SmallStore(tmp_path / "store", [write_tar(tmp_path / "a" / "x.tar", members)])
    known = small.indexes[0]
    other_key = [(n.replace("s003", "t003"), d) for n, d in members]
    other_image = [*members[:6], *sample("s003", 77), *members[8:]]
    for number, (changed, field, expected) in enumerate(
        [
            (other_key, "key of sample 3", "s003"),
            (other_image, "image digest of key s003", known.digests[3]),
            (members[:6], "samples", 5),
            (members[2:], "key of sample 0", "s000"),
        ]
    ):
        path = write_tar(tmp_path / str(number) / "x.tar", changed)
        with pytest.raises(IdentityError, match=r"\d of its \d images are known") as error:
            small.store.require(path, small.store.shard_ids())
        assert (error.value.field, error.value.expected) == (field, expected)


def test_the_index_of_a_shard_that_is_gone_is_damage(small):
    shard = small.indexes[0].id
    small.store.objects.remove(f"shards/{shard}.json")
    with pytest.raises(DamageError, match=rf"{shard}\.json: missing"):
        small.store.index(shard)
    with pytest.raises(DamageError, match=rf"{shard}\.json: missing"):
        small.store.require(small.shards[0], small.store.shard_ids())
    small.store.objects.put(f"shards/{shard}.json", small.indexes[1].dump())
    with pytest.raises(DamageError, match=f"it is the index of {small.indexes[1].id}"):
        small.store.index(shard)


# ---------------------------------------------------------------------------------------------- errors, records


def test_errors_survive_the_way_from_a_worker():
    error = IdentityError("x.tar", "label", 1, 2, "do this")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "x.tar: label: expected 1, found 2\n  do this"
    assert (type(again), again.field, again.expected, again.found) == (IdentityError, "label", 1, 2)
    assert str(pickle.loads(pickle.dumps(DamageError("gone")))) == "gone"


def test_the_nearest_word_is_proposed_or_all_are_listed():
    assert did_you_mean("resiez", ["resize", "crop"]) == "Did you mean 'resize'?"
    assert did_you_mean("zzz", ["b", "a"]) == "Known: a, b."
    assert did_you_mean("zzz", []) == "None is known here."


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.text().filter(lambda key: key != "digest"), json_values, max_size=4))
@settings(max_examples=60)
def test_a_record_is_read_back_and_only_in_its_one_spelling(content):
    data = json_record.to_json(content)
    again = json_record.from_json(data, "x")
    assert {key: value for key, value in again.items() if key != "digest"} == content
    assert json_record.to_json(again) == data
    for other in (data[:-1], data + b"\n", b" " + data, json.dumps(again, indent=1).encode()):
        with pytest.raises(DamageError, match="x: damaged"):
            json_record.from_json(other, "x")


def test_an_attempt_writes_below_a_name_that_nobody_else_uses(kept):
    small, _ = kept
    task = Task("target", "u8", small.indexes[0].id, 9)
    assert len({Attempt(small.store, task, 70).name for _ in range(100)}) == 100
