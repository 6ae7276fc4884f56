"""A checkpoint of a training as a teacher: which of its weights are taken, by a flag or a project file."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from pipeline.cli import main
from storage.store.store import Store
from storage.testing import TINY_VIT, synthetic_shards
from student.fit_teacher.network import network_of
from tests.conftest import write_teacher

if TYPE_CHECKING:
    from pathlib import Path

HALF = {"mean": 0.5, "std": 0.5}
ARGUMENTS = {**TINY_VIT[1], "num_classes": 3}


@pytest.fixture
def run(capsys: Any) -> Any:
    def call(*words: object) -> tuple[int, Any, str]:
        with pytest.raises(SystemExit) as ended:
            main([*map(str, words), "--json"])
        captured = capsys.readouterr()
        return int(ended.value.code or 0), json.loads(captured.out), captured.err

    return call


def test_a_key_in_a_project_file_or_a_flag_chooses_the_weights(tmp_path: Path, run: Any) -> None:
    synthetic_shards(tmp_path, shards=1, samples=12, stem="train")
    plain, average = (write_teacher(tmp_path / f"{n}.safetensors", TINY_VIT, seed=n) for n in (1, 2))
    torch.save({"state_dict": load_file(plain), "state_dict_ema": load_file(average)}, tmp_path / "w.pth")
    common = {"teacher": TINY_VIT[0], "args": ARGUMENTS, "targets": "logits", **HALF}
    content = {
        "shards": "train-000000.tar",
        "store": "S",
        "views": {"policy": "light", "size": 32, "count": 1},
        "teachers": {
            "timms": {**common, "weights": "w.pth"},
            "named": {**common, "weights": "w.pth", "weights_key": "state_dict"},
            "plain": {**common, "weights": plain},
            "average": {**common, "weights": average},
        },
    }
    project = tmp_path / "p.yaml"
    project.write_text(json.dumps(content))
    status, made, err = run("precompute", "--project", project)
    assert status == 0, err
    assert "w.pth: state_dict_ema (it also has state_dict), as timm chooses; choose others by --weights-key KEY" in err
    store = Store.open(tmp_path / "S")
    logits = {name: store.array(made["teachers"][name]["targets"][0]).compute() for name in content["teachers"]}
    assert (logits["timms"] == logits["average"]).all()
    assert (logits["named"] == logits["plain"]).all()
    assert (logits["plain"] != logits["average"]).any()

    shards = ["--shards", tmp_path / "train-000000.tar"]
    for words in ([], ["--weights", tmp_path / "w.pth"]):  # a key that was recorded is not asked for again
        status, checked, err = run("verify", "--project", project, *shards, *words)
        assert status == 0, err
        assert checked["compared_with"]["timms"].startswith("PyTorch teacher")
    status, said, _ = run("precompute", "--project", project, "--teacher", "timms", "--weights-key", "state_dict")
    assert status == 1
    assert "weights key" in said["error"]


def test_untrained_weights_in_a_project_file_are_verified_against_the_network(tmp_path: Path, run: Any) -> None:
    synthetic_shards(tmp_path, shards=1, samples=12, stem="train")
    torch.manual_seed(3)
    file = str(tmp_path / "w.safetensors")
    save_file(timm.create_model(TINY_VIT[0], **ARGUMENTS).state_dict(), file)
    common = {"teacher": TINY_VIT[0], "args": ARGUMENTS, "targets": "logits", **HALF}
    content = {
        "shards": "train-000000.tar",
        "store": "S",
        "views": {"policy": "light", "size": 32, "count": 1},
        "teachers": {"untrained": {**common, "weights": "random:3"}, "file": {**common, "weights": file}},
    }
    project = tmp_path / "p.yaml"
    project.write_text(json.dumps(content))
    status, made, err = run("precompute", "--project", project)
    assert status == 0, err
    assert f"untrained weights of {TINY_VIT[0]}, seed 3" in err
    store = Store.open(tmp_path / "S")
    assert store.teachers()["untrained"].weights == "random:3"
    logits = {name: store.array(made["teachers"][name]["targets"][0]).compute() for name in content["teachers"]}
    assert (logits["untrained"] == logits["file"]).all()
    status, report, err = run("verify", "--project", project)
    assert status == 0, err
    assert report["compared_with"]["untrained"] == "PyTorch teacher (random:3)"
    network = network_of(store.teachers()["untrained"], None, 5)
    own = network.state_dict()
    assert own["head.weight"].shape[0] == 5
    assert all(torch.equal(own[name], tensor) for name, tensor in load_file(file).items() if "head" not in name)
