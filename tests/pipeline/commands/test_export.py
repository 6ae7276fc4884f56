"""A student leaves the project: as a bare timm state dict, as an ONNX graph, and with a card that says how."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml

from pipeline.cli import main
from pipeline.export_onnx import export
from storage.errors import UserError
from storage.shards.shard import open_shards
from storage.testing import synthetic_shards
from storage.views.policy import policy
from student.evaluation.batches import evaluation_batches
from student.models.files import load_student
from tests.student.runs import run, u8


@pytest.fixture(scope="module")
def taught(world, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("taught") / "run"
    run(world, out, "aal", u8(world), "model_ema_decay=0.9")
    return out


def images(world, about) -> np.ndarray:
    return next(
        evaluation_batches(open_shards(world.shards), policy(about.evaluation, about.img_size), 64)
    ).images.numpy()


def test_the_graph_gives_the_students_logits_from_bytes(world, taught, tmp_path, capsys) -> None:
    words = [part for shard in world.shards for part in ("--shards", shard)]
    with pytest.raises(SystemExit) as ended:
        main(["export", str(taught), *words, "--out", str(tmp_path / "s.onnx"), "--json"])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["checked"] == 16
    model, about = load_student(taught / "last.safetensors")
    seen = images(world, about)
    session = onnxruntime.InferenceSession(str(tmp_path / "s.onnx"), providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["images"]
    (logits,) = session.run(["logits"], {"images": seen})
    batch = next(evaluation_batches(open_shards(world.shards), policy(about.evaluation, about.img_size), 64))
    with torch.no_grad():
        expected = model(batch.pixels(about.mean, about.std)).numpy()
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()
    told = {p.key: json.loads(p.value) for p in onnx.load(tmp_path / "s.onnx").metadata_props}
    assert told["classes"] == ["class0", "class1", "class2"]
    assert (told["size"], told["view"]) == (about.img_size, about.evaluation)


def test_shards_without_labels_serve(taught, tmp_path) -> None:
    shards = synthetic_shards(tmp_path / "data", shards=1, samples=5, labels=False)
    assert export(taught / "last.safetensors", shards, tmp_path / "s.onnx")["checked"] == 5


def test_the_card_says_how_to_load_it_and_that_works(world, taught, monkeypatch) -> None:
    text = (taught / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    result = json.loads((taught / "result.json").read_text())
    assert header["model-index"][0]["results"][0]["metrics"][0]["value"] == result["top1"]
    assert "| averaged student |" in text
    assert re.search(r"loss `aal`: target cnn-activations-\S+ of teacher cnn \(resnet10t, weights [^/]+, sha256 ", text)
    assert f"weights {Path(world.weights['cnn']).name}, sha256" in text
    assert "- 2 epochs at batch 32, seed 0" in text
    assert "smoke" not in text
    code = text.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(taught)
    made: dict[str, Any] = {}
    exec(code, made)
    ours, _ = load_student(taught / "last.safetensors")
    theirs = made["model"].state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.state_dict().items())


def test_the_card_of_a_smoke_run_claims_nothing(world, tmp_path) -> None:
    run(world, tmp_path / "run", "scratch", "optim.epochs=300", smoke=True)
    text = (tmp_path / "run" / "README.md").read_text()
    _, header, body = text.split("---", 2)
    assert "model-index" not in yaml.safe_load(header)
    assert body.split("\n\n")[2].startswith("**A smoke run, to see that everything works")
    assert "- 3 steps at batch 32, seed 0" in text
    assert "300" not in text


def test_what_cannot_be_exported_is_named(world, taught, tmp_path) -> None:
    (tmp_path / "s.onnx").write_bytes(b"mine")
    with pytest.raises(UserError, match="already exists"):
        export(taught / "last.safetensors", world.shards, tmp_path / "s.onnx")
    one = synthetic_shards(tmp_path / "one", shards=1, samples=1)
    with pytest.raises(UserError, match="one image is too few"):
        export(taught / "last.safetensors", one, tmp_path / "t.onnx")
    assert not (tmp_path / "t.onnx").exists()
    with pytest.raises(UserError, match="no student here"):
        export(tmp_path / "none.safetensors", world.shards, tmp_path / "t.onnx")
