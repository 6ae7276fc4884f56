"""Teachers are measured: what a store holds is what runs live, and both are a plain loop over the images."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

import student.data.block_reader
from pipeline.cli import main
from pipeline.evaluation.teacher import TeacherQuery, open_teacher
from precompute.export.pytorch import compare
from precompute.taps import Tap
from storage.shards.shard import open_shards
from storage.store.store import Store
from storage.testing import TINY_VIT, synthetic_shards
from storage.views.policy import policy
from student.evaluation.frozen.features import Features, gathered
from student.evaluation.frozen.knn import knn_ranks
from tests.conftest import run_precompute, teacher_of
from tests.precompute.graphs import exported

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import World

    Tell = Callable[..., tuple[dict[str, Any], str]]

EVAL = {"policy": policy("eval", 32), "policy_fields": frozenset({"line", "size"}), "num_views": 1, "new_bank": True}
NAMES = ["class0", "class1", "class2"]
VIT = ["vit_tiny_patch16_224", "--mean", ".5", "--std", ".5", "--input-size", "32"]
VIT += [word for name, value in TINY_VIT[1].items() for word in ("--teacher-arg", f"{name}={value}")]
CLASSES = ["--teacher-arg", "num_classes=3"]


@pytest.fixture(scope="module")
def place(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that know their classes and weights without a head; a store of views without chance in `store`."""
    folder = tmp_path_factory.mktemp("measured")
    state = load_file(world.weights["vit"])
    save_file(state, folder / "named.safetensors", {"classes": json.dumps(NAMES)})
    save_file({n: t for n, t in state.items() if not n.startswith("head.")}, folder / "headless.safetensors")
    vit, cnn = teacher_of({"vit": str(folder / "named.safetensors")}, "vit"), teacher_of(world.weights, "cnn")
    taps = ["logits,codec=f16", "logits,codec=f32", "embedding,codec=f16", "embedding,codec=f32"]
    run_precompute(folder / "store", world.shards, vit, taps, **EVAL)
    run_precompute(folder / "store", world.shards, cnn, ["logits"], **EVAL)
    token = teacher_of(world.weights, "vit", teacher_name="token")
    run_precompute(folder / "store", world.shards, token, ["class_token,codec=f32"], **EVAL)
    return folder


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str]) -> Tell:
    def call(*words: object, status: int = 0) -> tuple[dict[str, Any], str]:
        with pytest.raises(SystemExit) as ended:
            main(["evaluate", *map(str, words), "--json"])
        said = capsys.readouterr()
        assert ended.value.code == status, said.err
        assert "Traceback" not in said.err
        return (json.loads(said.out) if status == 0 else {}), said.err

    return call


def pictures(shard: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The images of a shard, f32 `[N, 3, 32, 32]` from -1 to 1, by Pillow alone: short side 37, the middle; labels."""
    images, labels = [], []
    with tarfile.open(shard) as tar:
        for member in tar:
            data = tar.extractfile(member).read()  # type: ignore[union-attr]
            if member.name.endswith(".cls"):
                labels.append(int(data))
                continue
            image = Image.open(io.BytesIO(data)).convert("RGB")
            side = min(image.size) * 32 / 37
            left, top = (image.width - side) / 2, (image.height - side) / 2
            box = (left, top, left + side, top + side)
            images.append(np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC, box=box)))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    return (pixels - 0.5) / 0.5, torch.tensor(labels)


def plain(weights: str | Path) -> Any:
    """The tiny ViT by timm alone."""
    model = timm.create_model(TINY_VIT[0], num_classes=3, **TINY_VIT[1])
    model.load_state_dict(load_file(weights))
    return model.eval()


def query(place: Path, name: str, **changes: Any) -> TeacherQuery:
    nothing = dict.fromkeys(["weights", "weights_key", "input_size", "mean", "std", "prefix", "tap_modules"])
    settings = {"settings": {**nothing, "arguments": {}}, "said": False, "model": name, "store_may_be_missing": False}
    view = {"view_policy": None, "view_size": None, "live": False}
    return TeacherQuery(name=name, store=str(place / "store"), **{**settings, **view, **changes})


@torch.no_grad()
def test_accuracy_stored_and_live_is_that_of_a_loop_over_the_images(world, place, tell) -> None:
    (pixels, labels), (more, others) = map(pictures, world.shards)
    logits, labels = plain(place / "named.safetensors")(torch.cat([pixels, more])), torch.cat([labels, others])
    right = logits.argmax(1) == labels
    shards = [word for shard in world.shards for word in ("--shards", shard)]
    live, err = tell("accuracy", "--teacher", *VIT, *CLASSES, "--weights", place / "named.safetensors", *shards)
    assert "runs live on the view short(0.875)|center at 32 (no store is given)" in err
    assert (live["source"], live["view"], live["view_size"]) == ("live", "short(0.875)|center", 32)
    assert live["top1"] == round(100 * float(right.double().mean()), 3)
    each = [
        {"class": f"class{n}", "samples": 100, "top1": 100 * float(right[labels == n].double().mean())}
        for n in range(3)
    ]
    assert live["classes"] == [pytest.approx(one) for one in each]
    stored, err = tell("accuracy", "--teacher", "vit", "--store", place / "store", *shards)
    assert "runs live" not in err
    targets = Store.open(place / "store").targets()
    assert (targets[stored["source"]].identity.tap, targets[stored["source"]].identity.codec) == ("logits", "f32")
    assert stored.pop("teacher") == "vit"
    assert {**stored, "source": "live"} == {name: value for name, value in live.items() if name != "teacher"}


def test_what_is_stored_is_read_without_the_images(world, place, tell, monkeypatch) -> None:
    monkeypatch.setattr(student.data.block_reader, "decode", None)
    monkeypatch.setattr(student.data.block_reader, "render", None)
    words = ["--teacher", "vit", "--store", place / "store", "--shards", world.shards[1]]
    assert tell("accuracy", *words)[0]["samples"] == 150
    assert tell("knn", *words, "--train-shards", world.shards[0])[0]["train"]["samples"] == 150


def test_k_nn_stored_equals_live_and_a_loop_over_the_images(world, place, tell) -> None:
    words = ["--teacher", "vit", "--store", place / "store", "--shards", world.shards[1]]
    words += ["--train-shards", world.shards[0]]
    stored, live = tell("knn", *words)[0], tell("knn", *words, "--live")[0]
    assert stored["features"] == live["features"] == "what the classifier reads (embedding)"
    assert stored["source"].startswith("vit-embedding-f32")
    assert live["source"] == "live"
    assert {**stored, "source": "live"} == live
    shards = open_shards(world.shards)
    answers = [
        open_teacher(query(place, "vit", live=live), ("embedding",), shards, torch.device("cpu"))
        for live in (False, True)
    ]
    bank, asked = ([gathered(one.batches([shard])) for one in answers] for shard in shards)
    for ours, theirs in (bank, asked):
        compare([ours.values.numpy()], [theirs.values.numpy()], [Tap("embedding")], "vit")
        assert torch.allclose(ours.values, theirs.values, atol=1e-5)
        assert torch.equal(ours.labels, theirs.labels)
    model = plain(place / "named.safetensors")
    with torch.no_grad():
        loop = [Features(values=model.forward_features(x)[:, 0], labels=y) for x, y in map(pictures, world.shards)]
    assert torch.allclose(bank[0].values, loop[0].values, atol=1e-5)
    ranks = knn_ranks(loop[0], loop[1], [10, 20], 3)
    assert [stored["knn"][k]["top1"] for k in ("10", "20")] == [
        round(100 * float((ranks[k] == 0).double().mean()), 3) for k in (10, 20)
    ]


def test_a_class_token_serves_where_no_embedding_is_stored(world, place, tell) -> None:
    words = ["--store", place / "store", "--shards", world.shards[1], "--train-shards", world.shards[0]]
    token, embedding = (tell("knn", "--teacher", name, *words)[0] for name in ("token", "vit"))
    assert token["features"] == "class token after the final norm"
    assert token["source"].startswith("token-class_token-f32")
    assert token["knn"] == embedding["knn"], "of this network they are one"


def test_a_probe_reads_what_is_stored_and_live_what_dino_reads(world, place, tell) -> None:
    words = ["--teacher", "vit", "--store", place / "store", "--shards", world.shards[1]]
    words += ["--train-shards", world.shards[0], "--lr", "0.1"]
    stored, live = tell("linear-probe", *words)[0], tell("linear-probe", *words, "--live")[0]
    assert (stored["width"], live["width"]) == (48, 3 * 48)
    assert live["features"] == "class tokens of the last 3 blocks, after the final norm"
    part = tell("linear-probe", *words, "--label-fraction", "50%")[0]
    assert part["train"]["samples"] == 75


def test_another_view_is_live_as_it_is_stored(world, place, tell) -> None:
    """A network of another input size resizes the view, as at precompute."""
    words = ["--teacher", "cnn", "--store", place / "store", "--shards", world.shards[0], "--same-classes"]
    stored = tell("accuracy", *words)[0]
    assert (stored["view_size"], stored["source"][:10]) == (32, "cnn-logits")
    live, err = tell("accuracy", *words, "--live", "--view-size", "32")
    assert "at 32 (--live)" in err
    assert {**stored, "source": "live"} == live
    own, err = tell("accuracy", *words, "--view-size", "64")
    assert (own["source"], own["view_size"]) == ("live", 64)
    assert "does not have logits of all these images in a view without chance" in err
    middle = tell("accuracy", *words, "--view-policy", "short(1)|center", "--live")[0]
    assert (middle["view"], middle["view_size"]) == ("short(1)|center", 64)


def test_classes_meet_by_name(world, place, tell, tmp_path) -> None:
    """A set that lists classes in another order, or some of them alone."""
    shard = shutil.copy(world.shards[0], tmp_path / "shard-000000.tar")
    words = ["accuracy", "--teacher", "vit", "--store", place / "store", "--shards", shard]
    logits, labels = plain(place / "named.safetensors")(pictures(world.shards[0])[0]), pictures(world.shards[0])[1]
    order = [2, 0, 1]
    (tmp_path / "classes.json").write_text(json.dumps([NAMES[n] for n in order]))
    right = logits.argmax(1) == torch.tensor(order)[labels]
    assert tell(*words)[0]["top1"] == round(100 * float(right.double().mean()), 3)
    (tmp_path / "classes.json").write_text(json.dumps(NAMES[:2]))
    _, err = tell(*words, status=1)
    assert "has label 2, there are classes 0 to 1" in err
    (tmp_path / "classes.json").write_text(json.dumps(["cat", "dog", "cow"]))
    _, err = tell(*words, "--same-classes", status=1)
    assert "class 0: expected 'class0', found 'cat'" in err


def test_flags_name_another_network_than_the_store_s(world, place, tell) -> None:
    words = ["accuracy", "--teacher", "vit", "--store", place / "store", "--shards", world.shards[0], "--same-classes"]
    _, err = tell(*words, "--weights", world.weights["cnn"], status=1)
    assert "teacher" in err
    same = tell(*words, "--weights", shutil.copy(place / "named.safetensors", place / "moved.safetensors"))[0]
    assert same["source"].startswith("vit-logits-")
    other, err = tell(*words, "--mean", ".4")
    assert other["source"] == "live"
    assert "does not have this teacher" in err


def test_a_project_file_names_teachers_and_a_store_that_is_still_to_be_made(
    world, place, tell, tmp_path, monkeypatch
) -> None:
    entry = {"teacher": VIT[0], "weights": str(place / "named.safetensors"), "mean": 0.5, "std": 0.5, "input_size": 32}
    about = {"teachers": {"mine": {**entry, "args": {**TINY_VIT[1], "num_classes": 3}}}, "val": world.shards}
    monkeypatch.chdir(tmp_path)
    Path("pipeline.yaml").write_text(yaml.safe_dump({**about, "store": "S"}))
    live = tell("accuracy", "--teacher", "mine")[0]
    assert live["source"] == "live"
    Path("pipeline.yaml").write_text(yaml.safe_dump({**about, "store": str(place / "store")}))
    stored = tell("accuracy", "--teacher", "vit")[0]
    assert stored["source"].startswith("vit-logits-")
    assert stored["top1"] == live["top1"]


def test_shots_are_counted_in_training_shards(world, place, tell, capsys) -> None:
    words = ["accuracy", "--teacher", "vit", "--store", place / "store", "--shards", f"seen={world.shards[0]}"]
    found = tell(*words, "--shot-bounds", "20,100", "--train-shards", world.shards[0])[0]
    assert found["sets"]["seen"]["medium"]["classes"] == 3
    with pytest.raises(SystemExit):
        main(["evaluate", *map(str, words)])
    assert "(short(0.875)|center at 32, stored: vit-logits-f32-" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "status", "message"),
    [
        ("accuracy", 2, "Missing argument 'RUN': a student; or a teacher: --teacher NAME"),
        ("knn --train-shards {shard}", 2, "Missing argument 'RUN'"),
        ("accuracy run --teacher vit", 2, "RUN (run) is a student, --teacher vit a teacher; give one of them"),
        ("accuracy run --weights F", 2, "--weights is for teachers: add --teacher NAME"),
        ("knn run --train-shards {shard} --store S", 2, "--store is for teachers"),
        ("accuracy --teacher vit --ensemble", 2, "--ensemble is for students; leave it out with --teacher"),
        ("knn --teacher vit --train-shards {shard} --projector-layers 1", 2, "--projector-layers is for students"),
        ("accuracy --teacher vit --checkpoint ema", 2, "--checkpoint is for students"),
        ("accuracy --teacher vit --store {store} --shot-bounds 1,2", 2, "'--train-shards'"),
        ("accuracy --teacher cnn --store {store}", 1, "give --same-classes"),
        ("accuracy --teacher vit --store no/where", 1, "there is no store here"),
        ("accuracy --teacher vti --store {store}", 1, "has teachers: cnn, token, vit."),
        ("accuracy --teacher vit --store {store} --view-policy light", 1, "--view-policy eval"),
        ("accuracy --teacher vit --store {store} --view-policy evil", 1, "Did you mean"),
        ("accuracy --teacher m.onnx", 1, "pipeline precompute --teacher m.onnx --view-policy 'short(0.875)|center' …"),
        ("accuracy --teacher {headless}", 1, "it has no classifier, so it has no logits"),
        ("accuracy --teacher {headless}", 1, "`pipeline evaluate knn --teacher vit_tiny_patch16_224 …`"),
        ("accuracy --teacher vit_tiny_patch16_224 --weights nowhere.pth", 1, "nowhere.pth"),
        ("accuracy --teacher vit_tiny_patch16_224 --teacher-arg x", 1, "--teacher-arg x: expected name=value"),
    ],
)
def test_mistakes_are_told(world, place, tell, typed, status, message) -> None:
    headless = " ".join([*VIT, "--teacher-arg num_classes=0 --weights", str(place / "headless.safetensors")])
    fill = {"shard": world.shards[0], "store": place / "store", "headless": headless}
    command, *more = typed.format(**fill).split()
    _, err = tell(command, "--shards", world.shards[1], *more, status=status)
    assert message in err


def test_other_classes_are_refused(world, place, tell, tmp_path) -> None:
    four = synthetic_shards(tmp_path, shards=1, samples=8, classes=4)
    words = ["accuracy", "--teacher", "token", "--store", place / "store", "--shards", four[0], "--same-classes"]
    _, err = tell(*words, status=1)
    assert "teacher token: number of classes: it has 3, the shards 4" in err


def test_a_store_with_several_views_is_asked_for_one_of_them(world, place, tell, tmp_path) -> None:
    store = tmp_path / "store"
    cnn = teacher_of(world.weights, "cnn")
    for line in ("none", "short(1)|center"):
        run_precompute(store, world.shards[:1], cnn, ["logits"], **{**EVAL, "policy": policy(line, 32)})
    words = ["accuracy", "--teacher", "cnn", "--store", store, "--shards", world.shards[0], "--same-classes"]
    _, err = tell(*words, status=1)
    assert "in several views without chance: " in err
    assert "--view-policy 'resize' --view-size 32" in err or "--view-policy 'short(1)|center' --view-size 32" in err
    assert tell(*words, "--view-policy", "none")[0]["view"] == "resize"
    both, err = tell(*words, "--shards", world.shards[1])
    assert both["source"] == "live", "the second shard is not there"
    assert "does not have logits of all these images" in err


def test_a_recorded_teacher_whose_file_is_another_now_does_not_run(world, place, tell, tmp_path) -> None:
    weights = str(shutil.copy(place / "named.safetensors", tmp_path / "w.safetensors"))
    run_precompute(tmp_path / "store", world.shards[:1], teacher_of({"vit": weights}, "vit"), ["logits"], **EVAL)
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)
    words = ["accuracy", "--teacher", "vit", "--store", tmp_path / "store", "--same-classes"]
    assert tell(*words, "--shards", world.shards[0])[0]["source"].startswith("vit-logits-")
    _, err = tell(*words, "--shards", world.shards[1], status=1)
    assert "weights sha256: expected " in err
    assert "records the teacher vit" in err


def test_a_ready_graph_is_measured_by_what_is_stored(world, place, tell, tmp_path, capsys) -> None:
    exported(teacher_of(world.weights, "vit"), "vit", tmp_path / "g.onnx")
    words = ["precompute", "--teacher", tmp_path / "g.onnx", "--mean", ".5", "--std", ".5", "--shards", world.shards[0]]
    words += ["--store", tmp_path / "store", "--view-policy", "eval", "--view-size", "32"]
    with pytest.raises(SystemExit) as ended:
        main([*map(str, words), "--tap-tensor", "logits=logits"])
    assert not ended.value.code, capsys.readouterr().err
    capsys.readouterr()
    words = ["accuracy", "--teacher", "g", "--store", tmp_path / "store", "--same-classes"]
    stored = tell(*words, "--shards", world.shards[0])[0]
    own = tell("accuracy", "--teacher", "vit", "--store", place / "store", "--shards", world.shards[0])[0]
    assert stored["top1"] == own["top1"]
    _, err = tell(*words, "--shards", world.shards[1], status=1)
    assert "g is a ready graph; it is measured by what a store keeps" in err
