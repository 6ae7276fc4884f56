"""fit-teacher: a head on stored features is the network's own classifier afterward, the file an ordinary teacher."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pipeline.cli import main
from precompute.export.pytorch import live_teacher
from precompute.taps import Tap
from precompute.teachers import teacher as teachers
from storage.errors import DamageError, IdentityError, UserError
from storage.objects import json_record
from storage.shards.classes import classes_of
from storage.store.store import Store
from storage.testing import TINY_VIT, synthetic_shards
from storage.views.policy import policy
from student.data.stream import Stream
from student.fit_teacher.fit import FitTeacherConfig, choose_target, fit_teacher, read_examples
from student.fit_teacher.network import network_of
from student.models.files import load_student as load_student
from tests.conftest import Quiet, run_precompute, teacher_of, write_teacher
from tests.storage.helpers import write_tar
from tests.student.runs import POOLED
from tests.typed import present

BROKEN = 17  # of the first shard: bytes that are no image


@dataclass
class Made:
    """Two shards, one with a broken image, and a store of their `deit` views with features of two ViTs."""

    folder: Path
    shards: list[str]
    val: list[str]
    weights: dict[str, str]
    targets: dict[str, str]

    @property
    def store(self) -> Store:
        return Store.open(self.folder / "store")

    def job(self, out: Path, target: str = "class_token", **changes) -> FitTeacherConfig:
        whole = {"store": self.store, "shards": self.shards, "val": self.val, "out": out, "l2": 0.01, **changes}
        return FitTeacherConfig(target=self.targets[target], **whole)

    def stream(self, target: str, batch: int = 1) -> Stream:
        return Stream(self.shards, batch_size=batch, lanes=1, store=self.store, targets=[self.targets[target]])


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    folder = tmp_path_factory.mktemp("teach")
    shards = synthetic_shards(folder / "data", shards=2, samples=150, classes=3)
    val = synthetic_shards(folder / "data", shards=1, samples=60, classes=3, seed=3, stem="val")
    with tarfile.open(shards[0]) as tar:
        members = [(member.name, present(tar.extractfile(member)).read()) for member in tar.getmembers()]
    broken = f"shard-000000-{BROKEN:05d}.png"
    write_tar(Path(shards[0]), [(name, b"no image" if name == broken else data) for name, data in members])
    weights = {
        "vit": write_teacher(folder / "vit.safetensors", TINY_VIT, seed=1),
        "pooled": write_teacher(folder / "pooled.safetensors", POOLED, seed=2),
    }
    pooled = teacher_of(
        {"vit": weights["pooled"]}, "vit", arguments={**POOLED[1], "num_classes": 3}, teacher_name="pooled"
    )
    options = {"policy": policy("deit", 32), "on_decode_error": "skip"}
    made = run_precompute(
        folder / "store",
        shards,
        teacher_of(weights, "vit"),
        ["class_token,codec=f32", "embedding,codec=u8", "logits"],
        **options,
    )
    more = run_precompute(folder / "store", shards, pooled, ["class_token", "embedding"], **options)
    names = ["class_token", "embedding", "logits", "pooled class_token", "pooled embedding"]
    return Made(folder, shards, val, weights, dict(zip(names, [*made["targets"], *more["targets"]], strict=True)))


@pytest.fixture(scope="module")
def fitted(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("fitted") / "mine.safetensors"
    progress = Quiet()
    return out, fit_teacher(made.job(out, l2=None), progress), progress.lines


def call(capsys, *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


# ---------------------------------------------------------------------------------------------- reading


def test_features_and_mixed_labels_are_those_of_the_stream(made):
    """The same samples through the stream, which renders images: joined by shard, sample and view."""
    target = made.targets["class_token"]
    alone = made.stream("class_token")
    examples = read_examples(alone, target, 3)
    assert len(examples.labels) == 2 * 299, "the broken image is left out"
    rows = [
        (segment.shard, int(sample), view)
        for shard in range(2)
        for view in range(2)
        for segment in alone.order.blocks
        if segment.shard == shard
        for sample in segment.samples
    ]
    at = {row: i for i, row in enumerate(rows)}
    assert (0, BROKEN, 0) not in at
    seen = mixed = 0
    stream = made.stream("class_token", batch=23)  # 13 × 23 = 299: all of an epoch
    for batch in [*stream.epoch(0), *stream.epoch(1)]:
        own = torch.tensor([at[tuple(row)] for row in batch.ids.tolist()])
        assert torch.equal(examples.features[own], batch.target(target))
        assert torch.equal(examples.labels[own], batch.labels)
        assert torch.equal(examples.mix_weights[own], batch.mix_weights)
        assert torch.equal(examples.mix_labels[own], batch.mix_labels)
        soft = batch.soft_labels(3)
        logits = torch.randn(len(own), 3)
        expected = -(soft * logits.log_softmax(1)).sum(1)
        assert torch.allclose(examples.losses(logits, own), expected, atol=1e-6)
        seen, mixed = seen + len(own), mixed + int((batch.mix_weights > 0).sum())
    assert seen == 2 * 299
    assert mixed > 200


def test_no_image_is_read_for_the_fit(made, monkeypatch):
    monkeypatch.setattr("storage.shards.shard.read_samples", lambda *a: pytest.fail("an image was read"))
    assert len(read_examples(made.stream("class_token"), made.targets["class_token"], 3).labels) == 598


def test_features_that_do_not_fit_into_memory_are_refused_with_figures(made):
    with pytest.raises(
        UserError, match=r"598 features \(299 samples × 2 views\) of 48 numbers take .* KiB are allowed"
    ):
        read_examples(made.stream("class_token"), made.targets["class_token"], 3, memory=100_000)


# ---------------------------------------------------------------------------------------------- the network


def live_logits(made: Made, out: Path, stream: Stream) -> tuple[torch.Tensor, torch.Tensor]:
    """Live logits of the written teacher and stored features, of two epochs of the stream's images."""
    arguments = {**TINY_VIT[1], "num_classes": 3}
    teacher = teachers.find_teacher(TINY_VIT[0], weights=str(out), arguments=arguments, mean=(0.5,), std=(0.5,))
    assert teacher.classes == ("class0", "class1", "class2")
    module = live_teacher(teacher, [Tap("logits")], 32)
    (target,) = stream.source.targets
    pairs = []
    for batch in stream.epoch(0):
        with torch.no_grad():
            pairs.append((module(batch.images)[0], batch.target(target)))
    live, features = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return live, features


def test_the_head_on_stored_features_gives_the_live_logits(made, fitted):
    out, result, lines = fitted
    live, features = live_logits(made, out, made.stream("class_token", batch=64))
    state = load_file(out)
    expected = features @ state["head.weight"].T + state["head.bias"]
    assert float((live - expected).abs().max() / live.abs().max()) <= 1e-5
    assert max(result.errors.values()) <= 1e-5
    assert result.l2 == result.tried[0].l2
    assert any(line.startswith("features take") for line in lines)


def test_all_but_the_head_is_the_recorded_teacher(made, fitted):
    out, result, _ = fitted
    before, after = load_file(made.weights["vit"]), load_file(out)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.weight", "head.bias"}
    assert before.keys() == after.keys()
    with safe_open(out, "pt") as file:
        said = file.metadata()
    assert json.loads(said["classes"]) == classes_of(made.shards)
    origin = json.loads(said["fitted"])
    assert origin["teacher"] == made.store.teachers()["vit"].identity.plain()
    assert (origin["target"], origin["l2"]) == (made.targets["class_token"], result.l2)


def test_it_learns_and_is_scored_on_every_validation_sample(made, fitted):
    from student.evaluation.accuracy import evaluate

    out, result, _ = fitted
    assert result.samples == 60
    assert result.top1 > 80
    student, about = load_student(out)
    view = policy(about.evaluation, about.img_size)
    assert evaluate(student, made.val, view, about.mean, about.std).top1 == result.top1


@pytest.mark.parametrize("target", ["embedding", "pooled embedding"])
def test_pooled_features_serve_too_within_their_codecs_error(made, tmp_path, target):
    result = fit_teacher(made.job(tmp_path / "t.safetensors", target), Quiet())
    assert result.errors["head"] <= 1e-5
    assert 1e-5 < result.errors["stored"] <= 0.1
    assert result.top1 > 80


def test_a_class_token_that_the_classifier_does_not_act_on_is_refused(made, tmp_path):
    with pytest.raises(UserError, match=r"differ from a linear head on class_token by .*\n.*target=embedding"):
        fit_teacher(made.job(tmp_path / "t.safetensors", "pooled class_token"), Quiet())
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------- as a command


def test_the_same_command_gives_the_same_bytes_and_the_next_one_runs(made, tmp_path, capsys):
    """And what it writes is a teacher as any other: its logits are precomputed, verified, and the head's."""
    shards = [word for url in made.shards for word in ("--shards", url)]
    words = [
        "fit-teacher",
        "--store",
        made.folder / "store",
        "--target",
        made.targets["class_token"],
        *shards,
        "--val",
        made.val[0],
        "--l2",
        0.01,
        "--json",
    ]
    files = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for file in files:
        status, out, err = call(capsys, *words, "--out", file)
        assert status == 0, err
    assert files[0].read_bytes() == files[1].read_bytes()
    store = shutil.copytree(made.folder / "store", tmp_path / "S")
    command = json.loads(out)["command"].replace(str(made.folder / "store"), str(store))
    status, out, err = call(capsys, *shlex.split(command)[1:], "--on-decode-error", "skip", "--json")
    assert status == 0, err
    (target,) = json.loads(out)["targets"]
    assert target.startswith("two-logits-")
    status, out, err = call(capsys, "verify", "--store", store, "--shards", made.shards[1], "--json")
    verified = json.loads(out)
    assert (status, verified["ok"]) == (0, True), verified
    assert verified["compared_with"]["two"] == f"PyTorch teacher ({files[1]})"
    assert Store.open(store).teachers()["two"].classes == ("class0", "class1", "class2")
    state = load_file(files[1])
    features, logits = (Store.open(store).array(t).compute() for t in (made.targets["class_token"], target))
    expected = features @ state["head.weight"].numpy().T + state["head.bias"].numpy()
    there = np.abs(features).sum(1) > 0  # not the broken image
    assert np.abs(expected - logits)[there].max() <= 1e-4 * np.abs(logits).max()


def test_any_argument_is_said_in_the_next_command_as_it_is_read_back():
    from pipeline.commands.fit_teacher import name_of
    from pipeline.options import arguments_in
    from student.targets.hints import argument

    values = {"a": "same", "b": 1e-05, "c": [8, 12], "d": True, "e": None, "f": "1", "g": {"x": 0.5}, "h": "a b" * 90}
    assert arguments_in(tuple(f"{name}={argument(value)}" for name, value in values.items())) == values
    assert (name_of("a/b c.safetensors"), name_of("views.safetensors")) == ("b_c", "fitted_views")


def test_the_teacher_is_enough_where_one_target_fits(made):
    with pytest.raises(UserError, match=r"2 targets fit: .*\n  Choose one: `target=ID`"):
        choose_target(made.store, None, "pooled")
    with pytest.raises(UserError, match=r"4 targets fit"):
        choose_target(made.store, None, None)
    with pytest.raises(UserError, match=r"no teacher is called 'vitt'. Did you mean 'vit'\?"):
        choose_target(made.store, None, "vitt")


def test_one_target_of_a_teacher_is_found(world):
    assert choose_target(Store.open(world.store), None, "vit") == world.targets["class_token"]
    assert choose_target(Store.open(world.store), None, None) == world.targets["class_token"]
    with pytest.raises(UserError, match=r"no target of cnn keeps class_token or embedding\n  Add one"):
        choose_target(Store.open(world.store), None, "cnn")


def refused(made: Made, tmp_path: Path, target: str = "class_token", **changes) -> str:
    with pytest.raises(UserError) as raised:
        fit_teacher(made.job(**{"out": tmp_path / "t.safetensors", "target": target, **changes}), Quiet())
    assert not (tmp_path / "t.safetensors").exists()
    return str(raised.value)


def test_what_cannot_be_is_refused_by_name(made, tmp_path):
    assert re.search(r"keeps logits; a linear head acts on class_token or embedding", refused(made, tmp_path, "logits"))
    assert "weights sha256: expected" in refused(made, tmp_path, weights=made.weights["pooled"])
    assert "cannot be read" in refused(made, tmp_path, weights="nowhere.safetensors")
    assert "does not exist" in refused(made, tmp_path, out=tmp_path / "no" / "t.safetensors")
    assert "expected a name ending in .safetensors" in refused(made, tmp_path, out=tmp_path / "t.pth")
    (tmp_path / "there.safetensors").write_bytes(b"mine")
    assert "already exists" in refused(made, tmp_path, out=tmp_path / "there.safetensors")
    assert "views of each sample: the store has 2, asked for 3" in refused(made, tmp_path, views=3)
    others = synthetic_shards(tmp_path / "others", shards=1, samples=70, seed=9)
    assert re.search(r"known in this store under other shards", refused(made, tmp_path, shards=others))
    single = synthetic_shards(tmp_path / "bare", shards=1, samples=9)
    (tmp_path / "bare" / "classes.json").unlink()
    bare = [str(shutil.copy(made.shards[1], tmp_path / "bare"))]
    assert "no classes.json beside it" in refused(made, tmp_path, shards=bare)
    (tmp_path / "bare" / "classes.json").write_text('["class0", "class1"]')
    assert "classes: expected 3 (class0, class1, class2), found 2 (class0, class1)" in refused(
        made, tmp_path, val=single
    )
    assert "has label 2, there are classes 0 to 1" in refused(made, tmp_path, shards=bare, val=single)


def test_one_block_leaves_nothing_to_choose_by(made, tmp_path):
    small = synthetic_shards(tmp_path / "data", shards=1, samples=30)
    run_precompute(tmp_path / "s", small, teacher_of(made.weights, "vit"), ["class_token"])
    whole = FitTeacherConfig(Store.open(tmp_path / "s"), small, small, tmp_path / "t.safetensors")
    with pytest.raises(UserError, match=r"one block of 64 samples leaves none .*\n  Give it: `l2=0.01`"):
        fit_teacher(whole, Quiet())
    assert fit_teacher(replace(whole, l2=0.1), Quiet()).samples == 30


def test_weights_that_have_moved_are_asked_for(made, tmp_path):
    weights = str(tmp_path / "gone.safetensors")
    recorded = made.store.teachers()["vit"].model_copy(update={"weights": weights})
    with pytest.raises(UserError, match=r"its weights are no longer at .*gone\.safetensors\n  Give them: `weights=F`"):
        network_of(recorded, None, 3)
    assert network_of(recorded, made.weights["vit"], 3) is not None


def test_weights_of_the_hub_are_known_by_their_digest(made, monkeypatch):
    from timm.models.vision_transformer import checkpoint_filter_fn

    from storage.objects.state_dict import digest_of_state

    state = load_file(made.weights["vit"])
    create = timm.create_model

    def hub(name, pretrained=False, **arguments):
        model = create(name, **arguments)
        if pretrained:
            model.load_state_dict(checkpoint_filter_fn(dict(state), model))
        return model

    monkeypatch.setattr(timm, "create_model", hub)
    teacher = made.store.teachers()["vit"]
    identity = teacher.identity.model_copy(update={"weights_sha256": digest_of_state(state)})
    recorded = teacher.model_copy(update={"identity": identity, "weights": "timm hub"})
    model = network_of(recorded, None, 5)
    assert torch.equal(model.state_dict()["cls_token"], state["cls_token"])
    assert model.state_dict()["head.weight"].shape == (5, 48)
    arguments = {name: value for name, value in identity.arguments.items() if name != "img_size"}
    digest = digest_of_state(hub(identity.model, True, **arguments).state_dict())  # of the hub's size, 224
    smaller = identity.model_copy(update={"arguments": arguments, "weights_sha256": digest})
    smaller = recorded.model_copy(update={"identity": smaller})
    assert network_of(smaller, None, 5).state_dict()["pos_embed"].shape == state["pos_embed"].shape
    state["cls_token"] += 1
    with pytest.raises(IdentityError, match="from timm's hub: weights sha256: expected"):
        network_of(recorded, None, 5)


@pytest.mark.parametrize("harm", ["chunk", "marker", "other views"])
def test_damage_and_exchanged_views_are_errors_by_name(made, tmp_path, harm):
    folder = Path(shutil.copytree(made.folder / "store", tmp_path / "S"))
    target = made.targets["class_token"]
    if harm == "chunk":
        path = next((folder / "targets" / target).rglob("data/c/0/0"))
        path.write_bytes(path.read_bytes()[:-9] + b"x" * 9)
    else:
        path = next((folder / "done").glob(f"target.{target}.*"))
        content = json_record.from_json(path.read_bytes(), "")
        path.unlink()
        if harm == "other views":
            path.write_bytes(json_record.to_json({**content, "bank_views": "0" * 64}))
    with pytest.raises(IdentityError if harm == "other views" else DamageError) as raised:
        fit_teacher(made.job(tmp_path / "t.safetensors", store=Store.open(folder)), Quiet())
    assert path.name in str(raised.value) or str(path) in str(raised.value)


def test_features_that_are_not_the_networks_are_refused(made, tmp_path, monkeypatch):
    """As if the store kept what another network said: the head would fit what the network never says."""
    from student.data.block_reader import BlockReader

    original = BlockReader.read

    def shifted(self, segment, view):
        part, arrays = original(self, segment, view)
        return part, {t: {n: np.roll(a, 1, 0) for n, a in several.items()} for t, several in arrays.items()}

    monkeypatch.setattr(BlockReader, "read", shifted)
    assert "differs from what the network says now" in refused(made, tmp_path)
