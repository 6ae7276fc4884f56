"""Recipes, the trainer and what it leaves; evaluation; the wishes that a store does not meet."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.recipes.loader import load_recipe
from storage.errors import IdentityError, UserError
from storage.store.store import Store
from storage.testing import TINY_CNN, synthetic_shards
from storage.views.policy import policy
from student.data.stream import Stream
from student.distributed import pick_device
from student.evaluation.accuracy import evaluate
from student.models.build import build_student
from student.models.files import load_student
from student.models.init import normalization
from student.recipe.validate import validate
from student.settings import BankChoice
from student.training.distiller import Distiller
from student.training.setup import TrainConfig
from student.training.train import train
from tests.conftest import Quiet, run_precompute, teacher_of
from tests.student.runs import STUDENT


def job(world, out: Path, recipe: str, *settings: str, **changes) -> TrainConfig:
    chosen = load_recipe(recipe, [*STUDENT, *settings])
    parts = {"shards": world.shards, "val": world.shards, "store": Store.open(world.store)}
    return TrainConfig(recipe=chosen, out=out, **{**parts, **changes})


@pytest.fixture(scope="module")
def u8(world) -> str:
    return f"losses.aal.target={world.targets['activations u8']}"


@pytest.fixture(scope="module")
def taught(world, u8, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "aal"
    console = Quiet()
    return out, train(job(world, out, "aal", u8, "optim.epochs=6"), console), console.lines


def test_aal_learns_and_says_what_it_took(world, taught):
    _, result, lines = taught
    assert result["top1"] > 60
    assert result["targets"] == {"aal": [world.targets["activations u8"]]}
    assert (result["views"], result["samples"], result["steps"]) == (2, 300, 54)
    text = "\n".join(lines)
    assert "60 maps (8 + 12 + 16 + 24) of 8x8" in text
    assert "2 layers x 3 heads = 6 class rows of 8x8" in text
    assert "420 weights; keys left out: class" in text
    assert result["bank"] in text


def test_the_log_has_every_epoch_with_falling_losses(taught):
    out, _, _ = taught
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    epochs = [r for r in records if "step" not in r]
    assert [r["epoch"] for r in epochs] == list(range(6))
    assert epochs[-1]["losses"]["crossentropy"] < epochs[0]["losses"]["crossentropy"]
    assert epochs[-1]["losses"]["aal"] < epochs[0]["losses"]["aal"]
    assert [r["weights"]["aal"] for r in epochs[:2]] == [2000, 1980]


def test_best_and_last_load_with_bare_timm(world, taught):
    import timm
    from safetensors import safe_open
    from safetensors.torch import load_file

    out, result, _ = taught
    with safe_open(out / "last.safetensors", "pt") as file:
        metadata = file.metadata()
    model = timm.create_model(metadata["model"], **json.loads(metadata["arguments"]))
    model.load_state_dict(load_file(out / "last.safetensors"))
    ours, about = load_student(out / "last.safetensors")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(images), ours(images))
    assert about.classes == ("class0", "class1", "class2")
    score = evaluate(ours, world.shards, policy(about.evaluation, 32), about.mean, about.std)
    assert score.top1 == result["top1"]
    assert score.samples == 300
    best, _ = load_student(out / "best.safetensors")
    assert evaluate(best, world.shards, policy(about.evaluation, 32), about.mean, about.std).top1 == result["best_top1"]


def test_the_card_s_code_runs_in_an_interpreter_that_knows_only_timm(taught, tmp_path):
    out, _, _ = taught
    code = (out / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    code += f"import torch\ntorch.save(model(torch.ones(1, 3, 32, 32)), {str(tmp_path / 'logits')!r})\n"
    subprocess.run([sys.executable, "-I", "-c", code], cwd=out, check=True)
    ours, _ = load_student(out / "last.safetensors")
    logits = torch.load(tmp_path / "logits", weights_only=True)
    assert torch.equal(logits, ours.eval()(torch.ones(1, 3, 32, 32)))


@pytest.mark.slow
def test_the_same_run_gives_the_same_weights_with_and_without_workers(world, u8, tmp_path):
    from safetensors.torch import load_file

    states = []
    for n, workers in enumerate((0, 0, 2)):
        train(job(world, tmp_path / f"{n}", "aal", u8, f"stream.workers={workers}"), Quiet())
        states.append(
            {**load_file(tmp_path / f"{n}" / "last.safetensors"), **load_file(tmp_path / f"{n}" / "losses.safetensors")}
        )
    for other in states[1:]:
        assert all(torch.equal(states[0][name], other[name]) for name in states[0])


def test_scratch_takes_fresh_views_or_a_bank_and_any_network(world, tmp_path):
    fresh = train(job(world, tmp_path / "fresh", "scratch", store=None), Quiet())
    assert (fresh["bank"], fresh["views"], fresh["policy"]) == (None, None, "crop(0.125)|flip")
    banked = train(job(world, tmp_path / "bank", "scratch"), Quiet())
    assert banked["bank"] is not None
    assert banked["views"] == 2
    name, _ = TINY_CNN
    train(
        job(
            world,
            tmp_path / "cnn",
            "scratch",
            f"student.model={name}",
            "student.patch_size=null",
            "student.embed_dim=null",
            "student.depth=null",
            "student.num_heads=null",
        ),
        Quiet(),
    )


def test_cross_entropy_alone_is_untouched_by_hooks(world):
    recipe = load_recipe("scratch", STUDENT)
    torch.manual_seed(0)
    model, _ = build_student(recipe.student, 3)
    batch = next(Stream(world.shards, batch_size=32, policy=policy("light", 32)).epoch(0))
    mean, std = normalization(recipe.student, None)
    distiller = Distiller(recipe, model, {}, mean=mean, std=std)
    logits, values = distiller(batch)
    expected = torch.nn.functional.cross_entropy(
        model(batch.pixels((0.5,) * 3, (0.5,) * 3)), batch.labels, label_smoothing=0.1
    )
    assert torch.allclose(values["crossentropy"], expected)
    assert torch.equal(distiller.total(values, 0), values["crossentropy"])
    assert logits.shape == (32, 3)


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ("stream.bank.policy=none", r"stream\.bank\.policy: asked for resize, the store has crop\(0\.125\)\|flip"),
        ("stream.bank.size=64", r"stream\.bank\.size: asked for 64, the store has 32"),
        ("stream.bank.seed=5", r"stream\.bank\.seed: asked for 5, the store has 0"),
        ("stream.bank=light-32-00000000", r"stream\.bank: asked for light-32-00000000, the store has light-32-\w"),
        ("losses.aal.teacher=vit", r"losses\.aal\.teacher: asked for vit, the store has cnn"),
        ("losses.aal.target=other", r"losses\.aal\.target: asked for other, the store has cnn-activations"),
        ("student.patch_size=8", r"patches a side: the student has 4, the store has 8\n.*activations,grid=4"),
        ("stream.views=3", "views of each sample: the store has 2, asked for 3"),
        ("student.num_classes=7", r"student\.num_classes: the file names 3, asked for 7"),
    ],
)
def test_a_wish_that_the_store_does_not_meet_names_the_field_and_both_sides(world, u8, tmp_path, wish, says):
    settings = [wish] if "target" in wish else [u8, wish]
    with pytest.raises(IdentityError, match=says):
        train(job(world, tmp_path / "run", "aal", *settings), Quiet())
    assert not (tmp_path / "run").exists()


def test_a_student_of_another_size_than_the_bank_is_refused(world, tmp_path):
    with pytest.raises(IdentityError, match=r"size: the student takes 64, they have 32\n.*img_size=32"):
        train(job(world, tmp_path / "run", "scratch", "student.img_size=64"), Quiet())


def test_several_targets_that_fit_are_refused_with_the_way_to_choose(world, tmp_path):
    with pytest.raises(UserError, match=r"2 targets fit: .*\n.*`losses\.aal\.target=cnn-activations-g8-native-f32"):
        train(job(world, tmp_path / "run", "aal"), Quiet())


def test_several_banks_that_fit_are_refused_with_the_way_to_choose(world, u8, tmp_path):
    store = world.copy(tmp_path / "store")
    run_precompute(
        store,
        world.shards,
        teacher_of(world.weights, "cnn"),
        ["logits"],
        policy=policy("none", 32),
        new_bank=True,
        num_views=1,
    )
    with pytest.raises(UserError, match=r"2 banks fit: .*\n.*`stream\.bank="):
        train(job(world, tmp_path / "run", "scratch", store=Store.open(store)), Quiet())
    bank = next(b for b in Store.open(store).banks() if b.startswith("none"))
    result = train(job(world, tmp_path / "run", "scratch", f"stream.bank={bank}", store=Store.open(store)), Quiet())
    assert (result["bank"], result["views"]) == (bank, 1)


def test_a_recipe_that_needs_targets_says_so_without_a_store(world, tmp_path):
    with pytest.raises(UserError, match=r"aal needs stored targets \(activations\)\n  Give `store=DIR`"):
        train(job(world, tmp_path / "run", "aal", store=None), Quiet())


@pytest.mark.parametrize("stored", [True, False])
def test_validation_shards_that_are_trained_on_are_told_by_their_content(world, tmp_path, stored):
    copied = shutil.copy(world.shards[1], tmp_path / "other-name.tar")
    shutil.copy(Path(world.shards[1]).parent / "classes.json", tmp_path)
    store = Store.open(world.store) if stored else None
    for number, (shards, told) in enumerate(((world.shards, True), (world.shards[:1], False))):
        console = Quiet()
        out = tmp_path / f"{number}"
        train(job(world, out, "scratch", store=store, shards=shards, val=[str(copied)], smoke=True), console)
        assert any(line.startswith(f"warning: {copied}: trained on too") for line in console.lines) == told


def test_a_store_without_the_tap_says_what_it_has(world, tmp_path):
    run_precompute(tmp_path / "store", world.shards, teacher_of(world.weights, "cnn"), ["logits"], num_views=1)
    with pytest.raises(UserError, match="aal needs stored activations, the store has logits"):
        train(job(world, tmp_path / "run", "aal", store=Store.open(tmp_path / "store")), Quiet())


def test_classes_are_never_guessed(world, tmp_path):
    shards = synthetic_shards(tmp_path / "data", shards=1, samples=64, classes=3)
    (tmp_path / "data" / "classes.json").unlink()
    with pytest.raises(UserError, match=r"the number of classes is not known\n  Give it: `student\.num_classes=N`"):
        train(job(world, tmp_path / "run", "scratch", store=None, shards=shards, val=shards), Quiet())
    with pytest.raises(UserError, match="has label 2, there are classes 0 to 1"):
        train(
            job(world, tmp_path / "run", "scratch", "student.num_classes=2", store=None, shards=shards, val=shards),
            Quiet(),
        )


def test_a_run_is_never_written_over(world, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "x").write_text("mine")
    with pytest.raises(UserError, match=r"this folder has other files \(x, …\)"):
        train(job(world, tmp_path / "run", "scratch", store=None), Quiet())


def test_a_loss_that_is_not_finite_ends_the_run(world, tmp_path):
    with pytest.raises(UserError, match=r"epoch \d, step \d+: the loss is not finite"):
        train(job(world, tmp_path / "run", "scratch", "optim.lr=1e30", "optim.opt=sgd", store=None), Quiet())


def test_validation_names_wrong_fields_with_the_nearest():
    good: dict[str, Any] = {"losses": {"crossentropy": {}}}
    assert validate(good, "r").losses["crossentropy"].weight.at(3) == 1
    assert validate({**good, "stream": {"bank": "x"}}, "r").stream.bank == BankChoice(id="x")
    changes: list[tuple[dict[str, Any], str]] = [
        ({"optim": {"epohcs": 3}}, r"optim\.epohcs: no such setting. Did you mean 'epochs'\?"),
        ({"studnet": {}}, r"studnet: no such setting. Did you mean 'student'\?"),
        ({"losses": {"aal": {"wieght": 1}}}, r"losses\.aal\.wieght: no such setting. Did you mean 'weight'\?"),
        ({"optim": {"epochs": "many"}}, r"optim\.epochs: should be a valid integer.*found 'many'"),
        ({"losses": {"aal": {"map": "half"}}}, r"losses\.aal\.map: should be 'scaled', 'printed' or 'full'"),
        ({"losses": {}}, "losses: no loss is enabled"),
        ({"student": {"global_pool": ""}}, r"student\.global_pool: should be 'token', 'avg' or 'map'"),
        ({"losses": {"aal": {"weight": "much"}}}, r"losses\.aal\.weight: expected a number, or a mapping with start"),
        (
            {"losses": {"advit": {"layers": "frist"}}},
            r"^r: losses\.advit\.layers: expected last, uniform, first-N, [^;]*$",
        ),
        (
            {"losses": {"advit": {"layers": [[1], [2]]}}},
            r"^r: losses\.advit\.layers: expected last, uniform, first-N, [^;]*$",
        ),
        ({"losses": {"aal": {"weight": {"strat": 1}}}}, r"losses\.aal\.weight\.strat: no such setting"),
        ({"student": {"freeze": 3}}, r"student\.freeze: expected a pattern, or a list"),
        ({"losses": {"mean": {"type": "aal", "map": "half"}}}, r"losses\.mean\.map: should be 'scaled'"),
        ({"optim": {"lr": float("nan")}}, r"optim\.lr: should be a finite number"),
    ]
    for change, message in changes:
        with pytest.raises(UserError, match=message):
            validate({**good, **change}, "r")
    with pytest.raises(UserError, match="expected a mapping"):
        validate([1], "r")


def test_yaml_s_words_that_are_numbers_are_numbers():
    recipe = validate({"losses": {"aal": {"weight": "1e3"}, "crossentropy": {}}}, "r")
    assert recipe.losses["aal"].weight.at(5) == 1000


def test_a_warm_up_that_is_not_over_is_said(world, tmp_path):
    console = Quiet()
    train(job(world, tmp_path / "run", "scratch", "optim.epochs=1", "optim.warmup_epochs=3", store=None), console)
    assert any("the warm-up takes 3 epochs and the run 1: lr never reaches its peak" in line for line in console.lines)


def test_a_loss_is_not_called_as_pytorch_s_own(world, tmp_path):
    settings = ["losses.half={type: crossentropy}"]
    with pytest.raises(UserError, match=r"losses\.half: PyTorch keeps this name"):
        train(job(world, tmp_path / "run", "scratch", *settings, store=None), Quiet())


def test_devices_that_are_not_there_are_refused(monkeypatch):
    for name, message in [
        ("mps", "expected auto, cpu, cuda or cuda:N"),
        ("gpu", "expected auto"),
        ("cpu:3", "expected auto"),
        ("cuda:7", "sees 1 CUDA device"),
    ]:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        with pytest.raises(UserError, match=message):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="sees no CUDA device; use cpu or auto"):
        pick_device("cuda")


def test_sizes_that_do_not_go_together_are_refused():
    changes: list[tuple[dict[str, Any], str]] = [
        ({"num_heads": 5}, "embed_dim 48 is not a multiple of num_heads 5"),
        ({"patch_size": 5}, "img_size 32 is not a multiple of the patch size 5"),
        ({"img_size": 100, "patch_size": None}, "img_size 100 is not a multiple of the patch size 16 of vit_tiny"),
        ({"model": "vit_tinny_patch16_224"}, "Did you mean 'vit_tiny_patch16_224'"),
        ({"model": "vit_tiny"}, "Did you mean 'vit_tiny_patch16_224'"),
        ({"model": "resnet10t"}, "cannot be made"),
    ]
    for change, message in changes:
        sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3, **change}
        recipe = validate({"student": sizes, "losses": {"crossentropy": {}}}, "r")
        with pytest.raises(UserError, match=message):
            build_student(recipe.student, 3)


def test_a_student_whose_attention_is_rotated_learns_by_it_and_one_of_windows_is_refused(world, u8, tmp_path):
    rotated = "student.model=eva02_tiny_patch14_224"
    assert train(job(world, tmp_path / "run", "aal", u8, rotated, "optim.epochs=1"), Quiet())["epochs"] == 1
    sizes = ["student.depth=null", "student.num_heads=null", "student.embed_dim=24"]
    with pytest.raises(UserError, match=r"aal reads the student's attention: SwinTransformer: .*it pools its patches"):
        train(job(world, tmp_path / "other", "aal", u8, "student.model=swin_tiny_patch4_window7_224", *sizes), Quiet())


def test_slips_are_found_before_the_first_epoch(world, u8, tmp_path):
    unlabeled = synthetic_shards(tmp_path / "none", shards=1, samples=64, labels=False)
    with pytest.raises(UserError, match="has no label"):
        train(job(world, tmp_path / "run", "aal", u8, val=unlabeled), Quiet())
    with pytest.raises(UserError, match=r"optim\.opt.*Did you mean 'adamw'"):
        train(job(world, tmp_path / "run", "aal", u8, "optim.opt=adamww"), Quiet())
    with pytest.raises(UserError, match=r"are about a store's bank\n  Give `store=DIR`"):
        train(job(world, tmp_path / "run", "scratch", "stream.views=2", store=None), Quiet())
    assert not (tmp_path / "run").exists()
