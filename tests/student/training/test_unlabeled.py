"""Training without labels: no classes, no classifier, no validation shards; and what becomes of such a student."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from PIL import Image

from pipeline.cli import main
from pipeline.export_onnx import export
from storage.errors import UserError
from storage.shards.shard import open_shards
from storage.testing import synthetic_shards
from storage.views.policy import policy
from student import run_dir
from student.evaluation.batches import evaluation_batches
from student.models.files import load_student
from student.training import train as trainer
from tests.conftest import Quiet, World, run_precompute, teacher_of
from tests.student.runs import FULL, command, job, log, run, same, weights
from tests.student.training.test_resume import Cut, cut_after

if TYPE_CHECKING:
    from pathlib import Path

    from student.run_dir import TrainResult

# class rows alone: a recipe that no label is read in
ROWS = ["losses.crossentropy=null", "losses.advit.layers=uniform", "losses.advit.grid=bicubic"]


@pytest.fixture(scope="module")
def bare(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Shards without labels and without classes.json, and a store with class rows, class tokens and logits."""
    place = tmp_path_factory.mktemp("bare")
    shards = synthetic_shards(place / "data", shards=2, samples=150, labels=False, seed=5)
    (place / "data" / "classes.json").unlink()
    vit = run_precompute(place / "store", shards, teacher_of(world.weights, "vit"), ["class_row", "class_token"])
    cnn = run_precompute(place / "store", shards, teacher_of(world.weights, "cnn"), ["logits"])
    targets = dict(zip(("class_row", "class_token", "logits"), [*vit["targets"], *cnn["targets"]], strict=True))
    return replace(world, folder=place, shards=shards, store=place / "store", targets=targets)


@pytest.fixture(scope="module")
def taught(bare: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainResult, list[str]]:
    out = tmp_path_factory.mktemp("taught") / "run"
    console = Quiet()
    return out, trainer.train(job(bare, out, "advit-l1", *ROWS, val=()), console), console.lines


def test_neither_labels_nor_classes_nor_validation_shards_are_asked_for(taught) -> None:
    out, result, lines = taught
    assert (result["top1"], result["best_top1"], result["top5"], result["samples"]) == (None, None, None, None)
    assert result["targets"].keys() == {"advit"}
    assert any("made without one, and no score is taken" in line for line in lines)
    model, about = load_student(out / "last.safetensors")
    assert not about.classifies
    assert about.classes is None
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 48), "it gives features"
    assert not (out / "best.safetensors").exists()
    epochs = [line for line in log(out) if "step" not in line]
    assert epochs[-1]["losses"]["advit"] < epochs[0]["losses"]["advit"]
    assert "top1" not in epochs[0]
    assert json.loads((out / "run.json").read_text())["classes"] == 0
    assert run_dir.result(out) == result


def test_shards_with_labels_give_the_same_student(world, bare, taught, tmp_path) -> None:
    """Labels that nobody reads change nothing."""
    labeled = synthetic_shards(tmp_path / "data", shards=2, samples=150, classes=3, seed=5)
    run_precompute(tmp_path / "store", labeled, teacher_of(world.weights, "vit"), ["class_row", "class_token"])
    other = replace(bare, shards=labeled, store=tmp_path / "store")
    console = Quiet()
    made = job(other, tmp_path / "run", "advit-l1", *ROWS, "student.num_classes=3", val=world.shards)
    result = trainer.train(made, console)
    assert result["top1"] is None
    assert any("student.num_classes is not used" in line for line in console.lines)
    ours, theirs = weights(tmp_path / "run"), weights(taught[0])
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_card_says_what_it_is_and_how_to_load_it(taught, monkeypatch) -> None:
    out, _, _ = taught
    text = (out / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header["pipeline_tag"] == "image-feature-extraction"
    assert "model-index" not in header
    assert "trained without labels and has no classifier" in text
    assert "- no labels" in text
    monkeypatch.chdir(out)
    made: dict[str, Any] = {}
    exec(text.partition("```python\n")[2].partition("```")[0], made)
    assert made["model"].num_classes == 0
    ours, _ = load_student(out / "last.safetensors")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(made["model"](images), ours(images)), "features"


def test_what_needs_a_classifier_says_so(world, taught, tmp_path, capsys) -> None:
    out, _, _ = taught
    Image.new("RGB", (32, 32)).save(tmp_path / "x.png")
    for words in (
        ["evaluate", "accuracy", str(out), "--shards", world.shards[0]],
        ["predict", str(out), str(tmp_path / "x.png")],
    ):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 1
        said = capsys.readouterr().err
        assert "trained without labels and has no classifier" in said
        assert "pipeline train --recipe fine-tune" in said


def test_its_features_are_measured_where_there_are_labels(world, taught, capsys) -> None:
    words = ["evaluate", "knn", str(taught[0]), "--shards", world.shards[0]]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--train-shards", world.shards[1], "--json"])
    said = capsys.readouterr()
    assert ended.value.code == 0, said.err
    result = json.loads(said.out)
    assert (result["samples"], result["width"]) == (150, 48)
    assert result["knn"]["10"]["top1"] > 50, "three classes"


def test_its_graph_gives_features(bare, taught, tmp_path) -> None:
    out, _, _ = taught
    assert export(out / "last.safetensors", bare.shards, tmp_path / "s.onnx")["checked"] == 16
    model, about = load_student(out / "last.safetensors")
    images = synthetic_shards(tmp_path / "seen", shards=1, samples=4)
    batch = next(evaluation_batches(open_shards(images), policy(about.evaluation, about.img_size), 4))
    session = onnxruntime.InferenceSession(str(tmp_path / "s.onnx"), providers=["CPUExecutionProvider"])
    (features,) = session.run(["embedding"], {"images": batch.images.numpy()})
    with torch.no_grad():
        expected = model(batch.pixels(about.mean, about.std)).numpy()
    assert np.abs(features - expected).max() <= 1e-4 * np.abs(expected).max()


def test_labels_train_a_new_head_on_it(world, taught, tmp_path) -> None:
    out, _, _ = taught
    console = Quiet()
    settings = [f"student.weights={out / 'last.safetensors'}", "optim.epochs=1"]
    result = trainer.train(job(world, tmp_path / "run", "scratch", *settings), console)
    assert result["top1"] is not None
    assert any("new are head.weight, head.bias" in line for line in console.lines)
    again = Quiet()
    settings = [*ROWS, f"student.weights={tmp_path / 'run' / 'last.safetensors'}", "optim.epochs=1"]
    trainer.train(job(world, tmp_path / "back", "advit-l1", *settings), again)
    assert any("left out is its classifier (head.bias, head.weight)" in line for line in again.lines), again.lines
    assert load_student(tmp_path / "back" / "last.safetensors")[1].classifies is False


def test_cut_off_it_goes_on_to_the_same_weights(bare, tmp_path, monkeypatch) -> None:
    settings = [*ROWS, *FULL, "checkpoint_interval=3"]
    whole = run(bare, tmp_path / "whole", "advit-l1", *settings, val=())
    with monkeypatch.context() as patched:
        cut_after(patched, 5)
        with pytest.raises(Cut):
            run(bare, tmp_path / "cut", "advit-l1", *settings, val=())
    result = run(bare, tmp_path / "cut", "advit-l1", *settings, val=(), resume=True)
    assert same(tmp_path / "whole", tmp_path / "cut")
    assert {**result, "run": 0, "seconds": 0} == {**whole, "run": 0, "seconds": 0}


def test_logits_train_a_classifier_without_labels(world, bare, tmp_path) -> None:
    """It is scored where validation shards have labels, and it is said where they have none."""
    settings = ["losses.crossentropy=null", "student.num_classes=3", "losses.deit.same_classes=true"]
    settings += ["student.model=vit_tiny_patch16_224", "model_ema_decay=null"]
    scored = run(bare, tmp_path / "scored", "deit-soft", *settings, val=world.shards)
    assert scored["samples"] == 300
    for val, said in ((bare.shards, "has no labels: no score"), ((), "no validation shards: no score")):
        console = Quiet()
        result = trainer.train(job(bare, tmp_path / f"{len(val)}", "deit-soft", *settings, val=val), console)
        assert result["top1"] is None
        assert any(said in line for line in console.lines)
        assert "It was not scored" in (tmp_path / f"{len(val)}" / "README.md").read_text()


def test_recipes_with_labels_still_ask_for_them(world, bare, tmp_path, capsys) -> None:
    with pytest.raises(UserError, match="Give `val=SHARDS`"):
        run(world, tmp_path / "run", "scratch", val=())
    with pytest.raises(UserError, match="has no label"):
        run(bare, tmp_path / "run", "scratch", "student.num_classes=3")
    words = [*command(world, tmp_path / "run", "scratch")]
    del words[words.index("--val") : words.index("--val") + 2]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "Missing option '--val'" in capsys.readouterr().err


def test_the_command_needs_no_validation_shards(bare, tmp_path, capsys) -> None:
    words = command(bare, tmp_path / "run", "advit-l1", *ROWS)
    del words[words.index("--val") : words.index("--val") + 2]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--smoke"])
    said = capsys.readouterr()
    assert ended.value.code == 0, said.err
    assert "not scored" in said.out
    assert "a smoke run: 3 step(s)\n" in said.err
