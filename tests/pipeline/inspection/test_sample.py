"""`inspect --sample`: what is drawn of a sample is what the stream gives for it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import plotting
from pipeline.cli import main
from pipeline.inspection.cells import Cell, cell, meaning
from pipeline.inspection.figure import picture
from pipeline.inspection.sample import MOST, facts, shown_box, stored_sample
from precompute.taps import TAPS
from precompute.taps.target_spec import parse_target
from precompute.teachers import onnx_file
from precompute.teachers import teacher as teachers
from storage.errors import DamageError, IdentityError, UserError
from storage.shards.index import cached_index
from storage.store.store import Store
from storage.testing import synthetic_shards
from storage.views.draw import draw_view
from storage.views.policy import policy
from storage.views.render import decode, render
from storage.views.view import View
from student.data.stream import Stream
from tests.conftest import run_precompute, teacher_of
from tests.manifests import teacher_manifest
from tests.precompute.graphs import HALF, exported, made_by

KEY = "shard-000001-00033"


@pytest.fixture(scope="module")
def mixed(world, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path, list[str]]:
    """A shard of 40 samples under `deit`: eight views of all taps of the ViT, two of the CNN's activations."""
    folder = tmp_path_factory.mktemp("mixed")
    shards = synthetic_shards(folder, shards=1, samples=40, classes=3)
    vit = [
        "class_row,codec=log8",
        "attention,layers=2+1",
        "q,k,v,layers=last",
        "tokens",
        "class_token",
        "embedding",
        "logits,codec=topk2",
    ]
    given = {"policy": policy("deit", 32), "num_views": 8}
    made = run_precompute(folder / "store", shards, teacher_of(world.weights, "vit"), vit, **given)
    cnn = ["activations,grid=8,layers=4+1"]
    more = run_precompute(folder / "store", shards, teacher_of(world.weights, "cnn"), cnn, **{**given, "num_views": 2})
    return shards, folder / "store", [*made["targets"], *more["targets"]]


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return int(str(ended.value.code)), said.out, said.err


def test_facts_are_what_the_stream_gives(mixed) -> None:
    """The identity: image and every value, of each sample that a stream yields, bit for bit."""
    shards, store, targets = mixed
    index = cached_index(shards[0])
    stream = Stream(shards, batch_size=16, store=store, targets=targets)
    compared = set()
    for batch in (batch for epoch in range(2) for batch in stream.epoch(epoch)):
        for row, (_, i, number) in list(enumerate(batch.ids.tolist()))[::4]:
            sample = stored_sample(Store.open(store), shards, index.keys[i])
            seen = sample.views[number]
            assert np.array_equal(seen.image, batch.images[row].numpy())
            assert seen.values.keys() == set(targets)
            for id in targets:
                arrays = {name: array[row : row + 1].numpy() for name, array in batch.targets[id].items()}
                assert np.array_equal(seen.values[id], batch.codecs[id].decode(arrays)[0]), id
            told = facts(sample)["views"][number]
            largest = float(batch.target(targets[0])[row].max())
            assert told["targets"][targets[0]]["max"] == pytest.approx(largest, rel=1e-6)
            assert (told["mix"]["share"] if told["mix"] else 0) == pytest.approx(float(batch.mix_weights[row]))
            if told["mix"]:
                partner = index.labels[index.keys.index(told["mix"]["partner"])]
                assert partner == int(batch.mix_labels[row])
            compared.add((i, number))
    assert {number for _, number in compared} == {0, 1}, "two views are all that every target has"


def test_the_parameters_give_the_image_again(world) -> None:
    sample = stored_sample(Store.open(world.store), world.shards, KEY)
    told = json.loads(json.dumps(facts(sample)))
    assert (told["key"], told["label"], told["class"]) == (KEY, 0, "class0")
    assert told["url"] == world.shards[1]
    assert set(told["targets"]) == set(world.targets.values())
    for view, seen in zip(told["views"], sample.views, strict=True):
        again = View(tuple(view["box"]), shift=tuple(view["shift"]), flip=view["flip"])
        assert np.array_equal(render(sample.original, again, told["size"]), seen.image)


def test_the_picture_shows_six_views_and_every_tap(mixed, capsys, tmp_path) -> None:
    shards, store, targets = mixed
    words = ("inspect", "--store", store, "--shards", shards[0], "--sample", "shard-000000-00007")
    status, out, _ = run(capsys, *words, "--out", tmp_path / "s.png", "--json")
    assert status == 0
    told = json.loads(out)
    assert told["files"] == [str(tmp_path / "s.png")]
    assert (len(told["views"]), told["views_stored"]) == (MOST, 8)
    assert {told["targets"][id]["tap"] for id in targets} == set(TAPS)
    assert [len(view["targets"]) for view in told["views"]] == [len(targets)] * 2 + [len(targets) - 1] * 4
    with Image.open(tmp_path / "s.png") as image:
        image.load()
        pixels = np.asarray(image.convert("RGB"))
    assert 1500 < pixels.shape[1] < 3000
    assert 2000 < pixels.shape[0] < 5000
    assert 0.2 < (pixels == 255).all(-1).mean() < 0.9, "there is paper, and something on it"
    status, out, _ = run(capsys, *words, "--out", tmp_path / "s.png")  # a picture is written over
    assert status == 0
    assert "and 2 more view(s), not looked at" in out
    for name, start in (("s.svg", b"<?xml"), ("s.pdf", b"%PDF")):
        assert run(capsys, *words, "--out", tmp_path / name)[0] == 0
        assert (tmp_path / name).read_bytes().startswith(start)
    assert {path.name for path in tmp_path.iterdir()} == {"s.png", "s.svg", "s.pdf"}


def test_maps_are_of_the_last_layer_and_stage(mixed) -> None:
    """Layers and stages were asked for as 2+1 and 4+1: the last is not the last in the array."""
    shards, store, _ = mixed
    sample = stored_sample(Store.open(store), shards, "shard-000000-00007")
    by_tap = {manifest.identity.tap: id for id, manifest in sample.targets.items()}

    def drawn(tap: str) -> tuple[np.ndarray, np.ndarray]:
        manifest = sample.targets[by_tap[tap]]
        values = sample.views[0].values[by_tap[tap]]
        return cell(manifest, sample.teachers[by_tap[tap]], values).values, values

    shown, values = drawn("attention")
    np.testing.assert_allclose(shown.ravel(), values[0].mean(0)[0, 1:], rtol=1e-6)
    row, _ = drawn("class_row")
    assert shown.shape == row.shape == (4, 4)
    shown, values = drawn("activations")
    stage = sample.targets[by_tap["activations"]].stages[0]
    assert stage.stage == 4
    maps = np.abs(values[: stage.channels])
    np.testing.assert_allclose(shown, (maps / maps.max((1, 2), keepdims=True)).mean(0), rtol=1e-5)
    assert "stage 4" in meaning(sample.targets[by_tap["activations"]], teacher_manifest())
    shown, values = drawn("logits")
    assert shown[0] == pytest.approx(np.exp(values).max() / np.exp(values).sum(), rel=1e-5)


@pytest.mark.slow
def test_a_ready_graph_is_drawn_as_its_network_is(world, tmp_path) -> None:
    """What a ready graph's manifest lacks, its targets say: the same cells as timm's own."""
    shards = synthetic_shards(tmp_path / "data", shards=1, samples=4)
    own = teacher_of(world.weights, "vit")
    path = exported(own, "vit", tmp_path / "graph.onnx")
    run_precompute(tmp_path / "S", shards, own, ["attention,codec=f32", "tokens,codec=f32"])
    tensors = {"attention": made_by(path, "Softmax"), "tokens": ["tokens"]}
    taps = [wish for text in ("attention,codec=f32", "tokens,codec=f32") for wish in parse_target(text)]
    run_precompute(
        tmp_path / "S",
        shards,
        teachers.find_teacher(str(path), **HALF),
        onnx_file.given_tensors(str(path), tensors, taps),
    )
    sample = stored_sample(Store.open(tmp_path / "S"), shards, "shard-000000-00002")
    seen: dict[str, list[Cell]] = {}
    for id, manifest in sample.targets.items():
        seen.setdefault(manifest.identity.tap, []).append(
            cell(manifest, sample.teachers[id], sample.views[0].values[id])
        )
        if manifest.identity.tap == "attention":
            assert meaning(manifest, sample.teachers[id]).startswith("layer 3: attention of the class token")
    assert seen.keys() == {"attention", "tokens"}
    for mine, theirs in seen.values():
        assert mine.values.shape == (4, 4)
        np.testing.assert_allclose(mine.values, theirs.values, rtol=1e-3, atol=1e-4)
        assert mine.note == theirs.note
    plotting.save(picture(sample), tmp_path / "s.png")


def test_a_map_that_differs_by_rounding_alone_is_of_one_color(mixed) -> None:
    shards, store, _ = mixed
    sample = stored_sample(Store.open(store), shards, "shard-000000-00007")
    (id,) = (id for id, manifest in sample.targets.items() if manifest.identity.tap == "class_row")
    noise = np.random.default_rng(0)
    for seen in sample.views:
        seen.values[id] = np.float32(1 / 17) * (1 + 1e-7 * noise.random(seen.values[id].shape, np.float32))
    colors = [
        len(np.unique(image.to_rgba(image.get_array()).reshape(-1, 4), axis=0))
        for axes in picture(sample).axes
        for image in axes.images
        if image.cmap.name == plotting.MAP
    ]
    assert colors.count(1) == len(sample.views), "those of the class rows"
    assert min(count for count in colors if count > 1) > 8


def test_the_box_shows_what_is_seen_of_the_original(world) -> None:
    """Painting over all that a view does not show changes nothing of it."""
    size = 32
    original = Image.effect_noise((64, 64), 90).convert("RGB")
    view = draw_view(policy("crop(0.125)", size), "a", 1, original.size)
    assert view.shift[0] > 0
    assert view.shift[1] < 0
    left, top, right, bottom = shown_box(view, size)
    assert (left, right) == (0, 64 - 2 * view.shift[0])
    assert (top, bottom) == (-2 * view.shift[1], 64)
    painted = Image.new("RGB", original.size, "red")
    border = 4  # bicubic looks two source pixels of scale 2 aside
    kept = (int(left), int(top) - border, int(right) + border, int(bottom))
    painted.paste(original.crop(kept), kept[:2])
    assert np.array_equal(render(painted, view, size), render(original, view, size))


def test_an_image_that_is_stored_is_shown_where_it_cannot_be_rendered(world, tmp_path, monkeypatch) -> None:
    shards = synthetic_shards(tmp_path / "data", shards=1, samples=5)
    teacher = teacher_of(world.weights, "cnn")
    made = run_precompute(tmp_path / "S", shards, teacher, ["logits"], store_views=True)
    store, key = Store.open(tmp_path / "S"), "shard-000000-00003"
    sample = stored_sample(store, shards, key)
    assert all(view["image"] == "stored" for view in facts(sample)["views"])
    assert len(sample.targets) == len(made["targets"]) - 1, "the image is no target beside itself"
    without = run_precompute(tmp_path / "T", shards, teacher, ["logits"])
    plain = stored_sample(Store.open(tmp_path / "T"), shards, key)
    assert set(plain.targets) == set(without["targets"])
    assert all(np.array_equal(a.image, b.image) for a, b in zip(sample.views, plain.views, strict=True))
    monkeypatch.setattr("storage.store.banks.render", lambda *given: np.zeros((32, 32, 3), np.uint8))
    assert np.array_equal(stored_sample(store, shards, key).views[0].image, sample.views[0].image)
    with pytest.raises(IdentityError, match="signature of the view's pixels"):
        stored_sample(Store.open(tmp_path / "T"), shards, key)


def test_of_two_banks_the_one_with_more_targets_is_shown(world, tmp_path, capsys) -> None:
    store = world.copy(tmp_path / "S")
    run_precompute(
        store,
        world.shards,
        teacher_of(world.weights, "cnn"),
        ["logits"],
        policy=policy("none", 32),
        num_views=1,
        new_bank=True,
    )
    words = ("inspect", "--store", store, "--shards", world.shards[1], "--sample", KEY, "--out", tmp_path / "s.png")
    status, out, _ = run(capsys, *words)
    assert status == 0
    assert "bank light-32-" in out
    assert "not shown, with fewer targets of it: bank none-32-" in out


def test_what_is_missing_is_asked_for(world, capsys, tmp_path) -> None:
    store = ("inspect", "--store", world.store)
    shard, sample, out = ("--shards", world.shards[0]), ("--sample", KEY), ("--out", tmp_path / "s.png")
    for words, said in (
        ((*sample, *shard), "add --out FILE.png"),
        ((*sample, *out), "add --shards SHARDS"),
        (sample, "add --shards SHARDS and --out FILE.png"),
        (shard, "add --sample KEY"),
        (out, "add --sample KEY"),
    ):
        status, _, err = run(capsys, *store, *words)
        assert (status, said in err) == (2, True), err
    assert not list(tmp_path.iterdir())


def test_errors_name_what_is_wrong(world, capsys, tmp_path) -> None:
    def said(*words: object) -> str:
        status, _, err = run(capsys, "inspect", "--store", world.store, *words)
        assert status == 1
        return err

    png = ("--out", tmp_path / "s.png")
    shards = ("--shards", world.shards[0], "--shards", world.shards[1])
    text = said(*shards, "--sample", "shard-000001-0033", *png)
    assert "no sample has the key 'shard-000001-0033' in 2 shard(s) (shard-000000.tar, shard-000001.tar)" in text
    assert f"'{KEY}'" in text
    assert "like 'shard-000000-00000'" in said(*shards, "--sample", "&", *png)
    (other,) = synthetic_shards(tmp_path / "other", shards=1, samples=4, stem="other")
    text = said("--shards", other, "--sample", KEY, *png)
    assert "shard: the store " in text
    (tmp_path / "mine.png").write_text("words")
    assert "not a picture" in said(*shards, "--sample", KEY, "--out", tmp_path / "mine.png")
    assert (tmp_path / "mine.png").read_text() == "words"
    assert "ends in .png" in said(*shards, "--sample", KEY, "--out", tmp_path / "s.gif")
    assert "does not exist; create it first" in said(*shards, "--sample", KEY, "--out", tmp_path / "no" / "s.png")
    assert not (tmp_path / "s.png").exists()


def test_a_key_in_two_shards_is_refused(world, tmp_path) -> None:
    one = synthetic_shards(tmp_path / "one", shards=1, samples=6)
    two = Path(synthetic_shards(tmp_path / "two", shards=1, samples=7, seed=1)[0])
    both = [*one, str(two)]
    run_precompute(tmp_path / "S", both, teacher_of(world.weights, "cnn"), ["logits"])
    with pytest.raises(UserError, match=r"one/shard-000000.tar and in .*two/shard-000000.tar; give one"):
        stored_sample(Store.open(tmp_path / "S"), both, "shard-000000-00002")
    assert stored_sample(Store.open(tmp_path / "S"), both, "shard-000000-00006").url == str(two)


def test_shards_that_precompute_has_not_come_to_are_passed_over(world, tmp_path) -> None:
    """As after a killed run: the first shard is in the store, two others are not, and a third has another content."""
    known, *others = synthetic_shards(tmp_path / "data", shards=3, samples=6)
    run_precompute(tmp_path / "S", [known], teacher_of(world.weights, "cnn"), ["logits"])
    (changed,) = synthetic_shards(tmp_path / "changed", shards=1, samples=5, seed=1)
    store, urls = Store.open(tmp_path / "S"), [*others, known]
    assert stored_sample(store, urls, "shard-000000-00004").url == known
    with pytest.raises(UserError) as refused:
        stored_sample(store, urls, "shard-000001-00004")
    assert "in 1 shard(s) (shard-000000.tar)" in str(refused.value)
    assert "Not in the store, so not looked into: shard-000001.tar, shard-000002.tar" in str(refused.value)
    assert stored_sample(store, [changed, known], "shard-000000-00005").url == known
    with pytest.raises(IdentityError, match=r"shard: the store .* has"):
        stored_sample(store, others, "shard-000001-00004")
    with pytest.raises(IdentityError, match="image digest"):
        stored_sample(store, [changed], "shard-000000-00004")


def test_a_damaged_chunk_is_named_and_nothing_is_written(world, capsys, tmp_path) -> None:
    store = world.copy(tmp_path / "S")
    id = world.targets["class_row"]
    chunk = next(path for path in (store / "targets" / id).rglob("c/0/*/*/*") if "shard-000001" in str(path))
    data = bytearray(chunk.read_bytes())
    data[5] ^= 1
    chunk.write_bytes(data)
    words = ("--shards", world.shards[1], "--sample", "shard-000001-00003", "--out", tmp_path / "s.png")
    status, _, err = run(capsys, "inspect", "--store", store, *words)
    assert status == 1
    assert str(chunk) in err
    assert not (tmp_path / "s.png").exists()
    (store / "teachers/cnn").rename(store / "cnn")
    with pytest.raises(DamageError, match=r"teachers/cnn/manifest\.json: missing, and cnn-"):
        stored_sample(Store.open(store), world.shards, KEY)
    (store / "cnn").rename(store / "teachers/cnn")
    for marker in (store / "done").glob(f"target.{id}.shard-000001-*.0.json"):
        marker.unlink()
    with pytest.raises(DamageError, match="missing"):
        stored_sample(Store.open(store), world.shards, KEY)


def test_a_sample_that_is_marked_invalid_is_said_to_be(world, tmp_path) -> None:
    import webdataset

    shard = tmp_path / "s-000000.tar"
    with webdataset.TarWriter(str(shard), mtime=0) as writer:
        for i in range(4):
            image = b"no image" if i == 2 else _png(i)
            writer.write({"__key__": f"k{i}", "png": image, "cls": b"0"})
    run_precompute(tmp_path / "S", [str(shard)], teacher_of(world.weights, "cnn"), ["logits"], on_decode_error="skip")
    with pytest.raises(UserError, match="key 'k2' is marked invalid"):
        stored_sample(Store.open(tmp_path / "S"), [str(shard)], "k2")


def _png(seed: int) -> bytes:
    import io

    data = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 255, (20, 50, 3), np.uint8)
    Image.fromarray(noise).save(data, "PNG")
    assert decode(data.getvalue()).size == (50, 20)
    return data.getvalue()


def test_names_that_are_no_plain_words_are_drawn(world, tmp_path) -> None:
    """Keys and class names come from anybody: mathematics, control characters, other scripts, great length."""
    import dataclasses

    sample = stored_sample(Store.open(world.store), world.shards, KEY)
    for name in (r"$\frac{$", "a$b$c", "\x00\n\t", "猫😀", "x" * 5000, " "):
        odd = dataclasses.replace(sample, key=name, name=name)
        plotting.save(picture(odd), tmp_path / "s.png")
        assert Image.open(tmp_path / "s.png").width < 3000
    assert plotting.shortened("abcdefgh", 5) == "ab…gh"


def test_without_matplotlib_the_command_says_what_to_install(world, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    words = ("--shards", world.shards[1], "--sample", KEY, "--out", tmp_path / "s.png")
    status, _, err = run(capsys, "inspect", "--store", world.store, *words)
    assert status == 1
    assert "pip install -c constraints.txt -e '.[cpu,demo]'" in err
