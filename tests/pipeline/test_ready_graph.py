"""A ready model.onnx on the command line: from the file to a student, by flags and by a project file."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from pipeline.cli import main
from storage.testing import synthetic_shards
from tests.conftest import teacher_of
from tests.precompute.graphs import OUTPUTS, exported, made_by, small

if TYPE_CHECKING:
    from pathlib import Path

SIZES = {
    "student.model": "vit_tiny_patch16_224",
    "student.img_size": 32,
    "student.patch_size": 8,
    "student.embed_dim": 48,
    "student.depth": 3,
    "student.num_heads": 3,
    "stream.batch_size": 16,
    "optim.epochs": 1,
    "optim.warmup_epochs": 0,
}
VIEWS = ["--view-policy", "light", "--view-size", 32, "--num-views", 2]
HALF = ["--mean", ".5", "--std", ".5"]


@pytest.fixture
def run(capsys: Any) -> Any:
    def call(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return int(ended.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def place(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a shard of 40 samples and both tiny teachers as files."""
    folder = tmp_path_factory.mktemp("ready-cli")
    synthetic_shards(folder, shards=1, samples=40, stem="train")
    for kind in ("cnn", "vit"):
        exported(teacher_of(world.weights, kind), kind, folder / f"{kind}.onnx")
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


SHARDS = ["--shards", "train-000000.tar"]
TRAIN = ["--val", "train-000000.tar", *(w for k, v in SIZES.items() for w in ("--set", f"{k}={v}"))]


@pytest.mark.slow
def test_from_a_file_to_a_student_that_learns_from_its_activations(here: Path, run: Any, tmp_path: Path) -> None:
    store = tmp_path / "S"
    taps = [w for name in OUTPUTS["cnn"][:4] for w in ("--tap-tensor", f"activations={name}")]
    words = ["--teacher", "cnn.onnx", *HALF, *taps, *SHARDS, "--store", store, *VIEWS]
    words += ["--target", "activations,layers=2:4,grid=4"]
    status, out, err = run("plan", *words, "--measure", 0, "--json")
    assert status == 0, err
    planned = json.loads(out)
    assert planned["targets"][0]["sample_shape"] == [52, 4, 4]
    status, out, err = run("precompute", *words, "--json")
    assert status == 0, err
    assert json.loads(out)["targets"] == [planned["targets"][0]["target"]]
    shown = run("inspect", "--store", store)[1]
    assert "teacher cnn: onnx" in shown
    assert "ready graph, input 64" in shown
    checked = json.loads(run("verify", "--store", store, *SHARDS, "--full", "--json")[1])
    assert checked["ok"]
    assert checked["targets_compared"] == 80
    assert checked["compared_with"] == {"cnn": "file run by itself (cnn.onnx)"}

    status, out, err = run(
        "train", "--recipe", "aal", "--store", store, *SHARDS, *TRAIN, "--out", tmp_path / "r", "--json"
    )
    assert status == 0, err
    assert "52 maps (12 + 16 + 24) of 4x4" in err
    log = [json.loads(line) for line in (tmp_path / "r/log.jsonl").read_text().splitlines()]
    assert len(log) == 2
    assert all(0 < line["losses"]["aal"] < 10 for line in log)


def test_a_project_file_names_taps_and_a_student_learns_from_attention(
    here: Path, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = made_by(here / "vit.onnx", "Softmax")
    entry = {"teacher": "vit.onnx", "mean": 0.5, "std": 0.5, "tap_tensors": {"attention": rows, "logits": "logits"}}
    content = {
        "shards": "train-000000.tar",
        "val": "train-000000.tar",
        "store": str(tmp_path / "S"),
        "views": {"policy": "light", "size": 32, "count": 1},
        "teachers": {"graph": entry},
        "set": SIZES,
    }
    (here / "project.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.chdir(tmp_path)  # paths are relative to the file
    project = ["--project", here / "project.yaml"]
    status, out, err = run("precompute", *project, "--json")
    assert status == 0, err
    made = json.loads(out)["teachers"]["graph"]
    assert [id.split("-")[1] for id in made["targets"]] == ["attention", "logits"]
    assert made["teacher"]["weights"] == str(here / "vit.onnx")
    status, out, err = run(
        "train",
        "--recipe",
        "attention-distill",
        *project,
        "--out",
        tmp_path / "r",
        "--set",
        "losses.attention.layers=uniform",
    )
    assert status == 0, err
    assert "rows of all queries, layers 1:3, 3 heads, 4x4 patches" in err
    status, out, err = run("precompute", *project, "--teacher", "graph", "--tap-tensor", "class_token=clss")
    assert status == 1
    assert (
        f"{here}/project.yaml: teachers.graph: {here}/vit.onnx: no tensor is called 'clss'\n  Did you mean 'cls'" in err
    )


def test_what_a_file_offers_is_shown(here: Path, run: Any) -> None:
    status, out, err = run("teachers", "vit.onnx")
    assert status == 0, err
    assert "input image [n, 3, 32, 32]" in out
    assert "output logits [n, 3]" in out
    found = json.loads(run("teachers", "vit.onnx", "--json")[1])
    assert found["tensors"]["attention"] == made_by(here / "vit.onnx", "Softmax")
    assert "cls" in found["tensors"]["class_token"]
    assert found["outputs"]["tokens"] == ["n", 17, 48]


def test_sizes_that_a_file_has_itself_are_not_asked_for(here: Path, run: Any) -> None:
    for words in (["--grid", 14], ["--input-size", 64]):
        status, _, err = run("teachers", "vit.onnx", *words)
        assert status == 2
        assert f"{words[0]} is for teachers that are networks of timm: a model.onnx has its own sizes" in err
        assert run("teachers", *words)[0] == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--teacher", "cnn.onnx", *HALF], "its outputs: stage1, stage2, stage3, stage4, logits"),
        (["--teacher", "cnn.onnx", "--tap-tensor", "logits=logits"], "Give --mean M and --std S"),
        (["--teacher", "cnn.onnx", *HALF, "--tap-tensor", "logits=logist"], "'logist'\n  Did you mean 'logits'?"),
        (["--teacher", "cnn.onnx", *HALF, "--tap-tensor", "k=logits"], "k: a ready graph gives no q, k and v"),
        (["--teacher", "resnet34", "--tap-tensor", "logits=y"], "--tap-tensor names tensors of a ready model.onnx"),
        (["--teacher", "gone.onnx", *HALF, "--tap-tensor", "logits=y"], "gone.onnx: cannot be read: No such file"),
        (["--teacher", "train-000000.tar", *HALF], "no teacher is called 'train-000000.tar'"),
        (["--teacher", "bad.onnx", *HALF, "--tap-tensor", "logits=y"], "bad.onnx: it has 2 inputs (a, b)"),
    ],
)
def test_mistakes_end_with_one_clear_message(here: Path, run: Any, tmp_path: Path, words: list[str], says: str) -> None:
    small(here / "bad.onnx", inputs=("a", "b"))
    status, out, err = run("precompute", *words, *SHARDS, "--store", tmp_path / "S", *VIEWS)
    assert status == 1
    assert says in err
    assert out == ""
    assert not (tmp_path / "S").exists()


def test_a_head_cannot_be_fitted_into_a_file(here: Path, run: Any, tmp_path: Path) -> None:
    words = [
        "--teacher",
        "vit.onnx",
        *HALF,
        "--tap-tensor",
        "class_token=cls",
        *SHARDS,
        "--store",
        tmp_path / "S",
        *VIEWS,
    ]
    assert run("precompute", *words)[0] == 0
    status, _, err = run(
        "fit-teacher",
        "--store",
        tmp_path / "S",
        "--teacher",
        "vit",
        *SHARDS,
        "--val",
        "train-000000.tar",
        "--out",
        tmp_path / "w.safetensors",
    )
    assert status == 1
    assert "teacher vit is a ready graph (vit.onnx), and a head is fitted into a PyTorch network" in err
