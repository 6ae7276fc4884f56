"""Mixing in the stream: the images that the teacher saw, with the labels and shares that belong to them."""

from __future__ import annotations

import shutil
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from storage.errors import DamageError, IdentityError, UserError
from storage.shards.index import cached_index, read_samples
from storage.store.markers import Task
from storage.store.store import Store
from storage.testing import TINY_CNN, synthetic_shards
from storage.views.policy import policy
from storage.views.render import render
from student.data.block_reader import BlockReader
from student.data.stream import Stream
from student.losses.cross_entropy import cross_entropy
from tests.conftest import run_precompute, teacher_of, write_teacher
from tests.storage.helpers import write_tar
from tests.student.data.mixed import DEIT, SEED, SIDE, VIEWS, Expected, all_same, alone, assert_as, rows_of, same
from tests.typed import present

if TYPE_CHECKING:
    from student.data.batch import Batch

BROKEN = 17  # of the first shard: bytes that are no image


@dataclass
class Made:
    """Two shards, one with a broken image and one that ends in a block of one, and a store of their `deit` views."""

    shards: list[str]
    weights: dict[str, str]
    store: Path
    targets: list[str]

    def stream(self, **changes) -> Stream:
        settings = {"batch_size": 32, "store": self.store, "targets": self.targets, "seed": 7}
        return Stream(changes.pop("shards", self.shards), **{**settings, **changes})

    def run(self, store: Path, **changes) -> dict[str, Any]:
        options = {"policy": DEIT, "num_views": VIEWS, "on_decode_error": "skip", **changes}
        wishes = ["logits", "logits,codec=topk2"]
        return run_precompute(store, self.shards, teacher_of(self.weights, "cnn"), wishes, **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    folder = tmp_path_factory.mktemp("mixing")
    (first,) = synthetic_shards(folder / "data", shards=1, samples=150, classes=3, kind="jpg", stem="first")
    (second,) = synthetic_shards(folder / "data", shards=1, samples=65, classes=3, seed=4, stem="second")
    with tarfile.open(first) as tar:
        members = [(member.name, present(tar.extractfile(member)).read()) for member in tar.getmembers()]
    broken = f"first-000000-{BROKEN:05d}.jpg"
    write_tar(Path(first), [(name, b"no image" if name == broken else data) for name, data in members])
    weights = {"cnn": write_teacher(folder / "cnn.safetensors", TINY_CNN)}
    made = Made([first, second], weights, folder / "store", [])
    made.targets = made.run(made.store)["targets"]
    return made


@pytest.fixture(scope="module")
def epochs(made) -> list[list[Batch]]:
    stream = made.stream()
    return [list(stream.epoch(epoch)) for epoch in range(2)]


@pytest.fixture(scope="module")
def expected(made) -> dict[tuple[int, int, int], Expected]:
    """(shard, sample, view) -> what it must be."""
    found = {}
    for shard, url in enumerate(made.shards):
        index = cached_index(url)
        samples = read_samples(url, index, range(len(index)))
        for view in range(VIEWS):
            rows = rows_of(made.store, index.id, view)
            own = {i: alone(samples[i].image, row) for i, row in enumerate(rows) if row["valid"]}
            for i, image in own.items():
                row = rows[i]
                partner, amount = int(row["partner"]), int(row["amount"])
                if row["mix"] == 1:
                    blend = own[i] * (1 - amount / 256) + own[partner] * (amount / 256)  # exact in f64
                    image = np.floor(blend + 0.5).astype(np.uint8)
                elif row["mix"] == 2:
                    left, top, right, bottom = (int(row[f"mix_{n}"]) for n in ("left", "top", "right", "bottom"))
                    inside = np.zeros((SIDE, SIDE, 1), bool)
                    inside[top:bottom, left:right] = True
                    image = np.where(inside, own[partner], own[i])
                label = present(samples[i].label)
                other = present(samples[partner].label) if row["mix"] else label
                share = amount / 256 if row["mix"] else 0
                found[shard, i, view] = Expected(image, label, other, share, partner)
    return found


# ---------------------------------------------------------------------------------------------- mixed streams


def test_images_labels_and_shares_are_those_that_the_banks_rows_say(epochs, expected):
    for batch in epochs[0] + epochs[1]:
        assert_as(batch, expected)
    ids = {tuple(id) for batches in epochs for batch in batches for id in batch.ids.tolist()}
    assert len(ids) > 300
    shares = torch.cat([batch.mix_weights for batch in epochs[0]])
    assert (shares > 0).float().mean() > 0.8
    assert ((shares >= 0) & (shares <= 1)).all()


def test_lanes_cut_blocks_and_partners_lie_outside_of_their_segments(made, expected):
    stream = made.stream()
    reader = BlockReader(stream.source)
    outside = pieces = 0
    for lane in range(stream.order.lanes):
        for segments, _ in stream.order.lane(0, lane):
            for segment in segments:
                arrays, _ = reader.read(segment, 1)
                pieces += len(segment.samples) < 64
                for row, i in enumerate(segment.samples.tolist()):
                    told = expected[segment.shard, i, 1]
                    assert np.array_equal(arrays["images"][row], told.image)
                    outside += told.share > 0 and told.partner not in segment.samples
    assert pieces > 5
    assert outside > 50


def test_an_invalid_sample_and_a_block_of_one_mix_with_nobody(epochs, expected):
    assert not any((0, BROKEN, view) in expected for view in range(VIEWS))
    assert all(told.partner != BROKEN for (shard, _, _), told in expected.items() if shard == 0)
    assert {expected[1, 64, view].share for view in range(VIEWS)} == {0}
    assert all([0, BROKEN] not in batch.ids[:, :2].tolist() for batches in epochs for batch in batches)


def test_each_view_mixes_anew(expected):
    pairs = [(expected[s, i, 0], expected[s, i, 1]) for s, i, view in expected if view == 0]
    assert sum(a.partner != b.partner for a, b in pairs) > len(pairs) * 0.8


def test_soft_labels_mix_the_labels_as_the_images_are_mixed(epochs, expected):
    for batch in epochs[0]:
        soft = batch.soft_labels(3)
        assert soft.dtype == torch.float32
        assert torch.allclose(soft.sum(1), torch.ones(32))
        for row, id in enumerate(batch.ids.tolist()):
            told, label = expected[tuple(id)], np.zeros(3)
            label[told.label] += 1 - told.share
            label[told.other] += told.share
            assert np.allclose(soft[row], label)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_cross_entropy_is_torchs_of_the_soft_labels(epochs, smoothing):
    torch.manual_seed(0)
    for batch in epochs[0]:
        logits = (torch.randn(32, 3) * 3).requires_grad_()
        loss = cross_entropy(logits, batch.labels, batch.mix_labels, batch.mix_weights, smoothing)
        (gradient,) = torch.autograd.grad(loss, logits)
        theirs = F.cross_entropy(logits, batch.soft_labels(3), label_smoothing=smoothing)
        (expected_gradient,) = torch.autograd.grad(theirs, logits)
        assert torch.allclose(loss, theirs, rtol=1e-6)
        assert torch.allclose(gradient, expected_gradient, atol=1e-7)


def test_cross_entropy_of_nothing_mixed_is_the_plain_one_in_any_precision():
    logits, labels = torch.randn(8, 5), torch.arange(8) % 5
    for kind in (torch.float32, torch.float64, torch.bfloat16):
        loss = cross_entropy(logits.to(kind), labels, labels, torch.zeros(8), 0.1)
        assert torch.equal(loss, F.cross_entropy(logits.to(kind), labels, label_smoothing=0.1, reduction="none").mean())
    assert torch.equal(
        cross_entropy(logits, labels, labels.flip(0), torch.ones(8)),
        F.cross_entropy(logits, labels.flip(0), reduction="none").mean(),
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_mixed_batches_are_the_same_with_loader_workers(made, epochs, workers):
    stream = made.stream(workers=workers)
    for epoch in range(2):
        assert all_same(stream.epoch(epoch), epochs[epoch])
    assert all_same(stream.epoch(1, start=3), epochs[1][3:])


def test_targets_of_topk_come_with_their_images(made, epochs):
    store = Store.open(made.store)
    exact, top = made.targets
    for batch in epochs[0][:2]:
        assert batch.targets[top]["index"].dtype == torch.uint16
        kept = batch.target(top)
        for row, (shard, i, view) in enumerate(batch.ids.tolist()):
            id = cached_index(made.shards[shard]).id
            stored = store.marker(Task("target", top, id, view)).arrays["index"].read(i, i + 1)[0]
            assert batch.targets[top]["index"][row].tolist() == stored.tolist()
        assert torch.allclose(kept.softmax(1), batch.target(exact).softmax(1), atol=1e-3)
        moved = batch.to("cpu")
        assert same(batch, moved)


def test_fresh_views_are_mixed_as_the_stored_ones_of_the_epochs_number_are(made, expected):
    fresh = Stream(made.shards[1], batch_size=16, policy=DEIT, seed=1)
    seen = Counter[bool]()
    for epoch in range(VIEWS):
        for batch in fresh.epoch(epoch):
            for row, (_, i, view) in enumerate(batch.ids.tolist()):
                told = expected[1, i, view]
                assert view == epoch
                assert np.array_equal(batch.images[row], told.image)
                assert (int(batch.mix_labels[row]), float(batch.mix_weights[row])) == (told.other, told.share)
                seen[told.share > 0] += 1
    assert seen[True] > 80
    other = Stream(made.shards[1], batch_size=16, policy=policy("deit", SIDE, SEED + 1), seed=1)
    assert not same(next(other.epoch(0)), next(fresh.epoch(0)))


@pytest.mark.parametrize("workers", [0, 1])
def test_fresh_mixed_views_do_not_depend_on_workers_lanes_or_start(made, workers):
    plain = Stream(made.shards[1], batch_size=16, policy=DEIT)
    there = Stream(made.shards[1], batch_size=16, policy=DEIT, workers=workers)
    epoch = list(plain.epoch(4))
    assert all_same(there.epoch(4), epoch)
    assert all_same(there.epoch(4, start=2), epoch[2:])
    by_id = {
        tuple(id): image
        for batch in Stream(made.shards[1], batch_size=16, policy=DEIT, lanes=2).epoch(4)
        for id, image in zip(batch.ids.tolist(), batch.images, strict=True)
    }
    common = [
        (id, image) for b in epoch for id, image in zip(b.ids.tolist(), b.images, strict=True) if tuple(id) in by_id
    ]
    assert len(common) > 32
    assert all(torch.equal(by_id[tuple(id)], image) for id, image in common)


def test_a_fresh_view_of_a_broken_image_names_it(made):
    stream = Stream(made.shards, batch_size=32, policy=DEIT)
    with pytest.raises(UserError, match=f"key 'first-000000-{BROKEN:05d}': cannot be decoded"):
        list(stream.epoch(0))


# ---------------------------------------------------------------------------------------------- pixels in the store


def contents(store: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(store)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in store.rglob("*")
        if path.is_file() and path.name != "README.md"
    }


@pytest.fixture(scope="module")
def with_pixels(made, tmp_path_factory) -> tuple[Path, str, dict[str, Any], dict[str, Any]]:
    """A copy of the store to which the pixels were added: its place, the target's id, its files before and after."""
    place = shutil.copytree(made.store, tmp_path_factory.mktemp("pixels") / "store")
    before = contents(place)
    (pixels,) = set(made.run(place, store_views=True)["targets"]) - set(made.targets)
    return place, pixels, before, contents(place)


def refuse_to_decode(monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("something was decoded")

    for name in (
        "storage.store.banks.render",
        "storage.views.render.decode",
        "student.data.block_reader.decode",
        "student.data.block_reader.render",
        "storage.shards.shard.read_samples",
        "storage.views.render.Image.open",
    ):
        monkeypatch.setattr(name, refuse)


def test_pixels_are_added_without_touching_what_is_there(with_pixels):
    _, pixels, before, after = with_pixels
    assert {name: after.get(name) for name in before} == before
    added = set(after) - set(before)
    assert added
    assert all(pixels in name for name in added), "markers, arrays and the manifest of the pixels alone"


def test_with_pixels_in_the_store_the_batches_are_the_same_and_nothing_is_decoded(
    made, epochs, with_pixels, monkeypatch
):
    place, pixels, _, _ = with_pixels
    stream = made.stream(store=place)
    refuse_to_decode(monkeypatch)
    assert stream.source.pixels == pixels
    for epoch in range(2):
        assert all_same(stream.epoch(epoch), epochs[epoch])
    plain = made.stream()
    assert plain.source.pixels is None
    with pytest.raises(AssertionError, match="something was decoded"):
        next(plain.epoch(0))


def test_with_pixels_loader_workers_give_the_same(made, epochs, with_pixels):
    assert all_same(made.stream(store=with_pixels[0], workers=1).epoch(1), epochs[1])


def test_with_pixels_the_tars_are_not_read_any_more_once_they_were_recognized(made, epochs, with_pixels, tmp_path):
    copies = [shutil.copy(url, tmp_path) for url in made.shards]
    stream = made.stream(shards=copies, store=with_pixels[0])
    for copy in copies:
        Path(copy).unlink()
    assert all_same(stream.epoch(0), epochs[0])
    with pytest.raises(UserError, match="no such shard"):
        made.stream(shards=copies, store=with_pixels[0])


def test_with_pixels_other_decoders_do_not_matter(made, epochs, with_pixels, monkeypatch):
    monkeypatch.setattr("storage.store.banks.render", lambda *arguments: render(*arguments) ^ 1)
    assert all_same(made.stream(store=with_pixels[0]).epoch(0), epochs[0])


@pytest.mark.parametrize("flip", [1, 128])
def test_without_pixels_another_decoder_is_an_error_that_offers_them(made, monkeypatch, flip):
    def other(*arguments):
        pixels = render(*arguments)
        pixels[7, 3, 1] ^= flip
        return pixels

    monkeypatch.setattr("storage.store.banks.render", other)
    with pytest.raises(
        IdentityError,
        match=r"key \S+: signature of the view's pixels: expected \w{8}, found \w{8}\n.*\n.*store the pixels where"
        r".*`store_views=True`",
    ):
        next(made.stream().epoch(0))


def test_pixels_of_fewer_views_than_the_targets_have_are_left_alone(made, epochs, tmp_path):
    place = shutil.copytree(made.store, tmp_path / "store")
    made.run(place, store_views=True, num_views=1)
    stream = made.stream(store=place)
    assert (stream.source.pixels, stream.views) == (None, 2)
    assert same(next(stream.epoch(0)), epochs[0][0])
    assert made.stream(store=place, views=1).source.pixels is not None
    shard = cached_index(made.shards[0]).id
    (marker,) = (place / "done").glob(f"target.views-pixels-raw-*.{shard}.0.json")
    marker.unlink()
    assert made.stream(store=place, views=1).source.pixels is None
    assert made.stream(store=place, views=1, shards=made.shards[1], batch_size=16).source.pixels is not None


@pytest.mark.parametrize("damage", ["flipped", "gone", "cut", "empty", "of another view"])
def test_a_damaged_chunk_of_pixels_is_an_error_that_names_it(made, with_pixels, tmp_path, damage):
    place, pixels, _, _ = with_pixels
    store = shutil.copytree(place, tmp_path / "store")
    shard = cached_index(made.shards[0]).id
    chunk, other = (next((store / "targets" / pixels / shard / str(view)).rglob("c/0/0/0/0")) for view in (0, 1))
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 4
    if damage == "gone":
        chunk.unlink()
    else:
        chunk.write_bytes(
            {"flipped": bytes(data), "cut": data[:-1], "empty": b"", "of another view": other.read_bytes()}[damage]
        )
    stream = made.stream(store=store)
    assert stream.source.pixels == pixels
    name = str(chunk.relative_to(store))
    with pytest.raises(DamageError, match=rf"{name}: (damaged|missing)"):
        [batch for epoch in range(VIEWS) for batch in stream.epoch(epoch)]


def test_pixels_alone_can_be_trained_on_without_targets(made, expected, with_pixels, monkeypatch):
    stream = made.stream(store=with_pixels[0], targets=[], bank=DEIT.bank)
    refuse_to_decode(monkeypatch)
    for batch in stream.epoch(0):
        assert_as(batch, expected)


def test_pixels_of_views_that_a_new_run_draws_are_those_of_the_bank(made, expected, tmp_path):
    """Everything in one run: the bank's views are drawn while the pixels are written."""
    made.run(tmp_path / "store", store_views=True)
    for batch in made.stream(store=tmp_path / "store").epoch(0):
        assert_as(batch, expected)
