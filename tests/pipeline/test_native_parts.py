"""Students with their teacher's parts, by the command line: warned of, trained, resumed, compiled, exported, loaded."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch

from pipeline.cli import main
from precompute.teachers.teacher import find_teacher
from storage.shards.shard import open_shards
from student.evaluation.batches import evaluation_batches
from student.models.files import load_student
from student.training import precision
from tests.conftest import run_precompute, write_teacher
from tests.student.models.test_student_args import mae_2d
from tests.student.runs import log, same
from tests.student.training.test_resume import cut_after

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import World

SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
SMALLER = {"student.embed_dim": 24, "student.depth": 2, "student.num_heads": 2}
PLAIN = {"student.model": "vit_tiny_patch16_224", "student.img_size": 32, "student.patch_size": 8, **SMALLER}
ADDED = {**PLAIN, "student.args": "{init_values: 1e-5, reg_tokens: 4, pos_embed: sincos}"}
TRAINING = {
    "losses.guidance.weight": 0.1,
    "stream.batch_size": 64,
    "optim.epochs": 2,
    "optim.warmup_epochs": 0,
    "checkpoint_interval": 1,
    "precision.amp_dtype": "none",
}


@pytest.fixture(scope="module")
def store(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the last class rows of a tiny DINOv2."""
    folder = tmp_path_factory.mktemp("parts")
    return keep(world, folder, "vit_small_patch14_dinov2", "dino2")


def keep(world: World, folder: Path, model: str, name: str) -> Path:
    weights = write_teacher(folder / f"{name}.safetensors", (model, SIZES))
    args = {**SIZES, "num_classes": 3}
    about: dict[str, Any] = {"weights": weights, "arguments": args, "input_size": 32, "mean": (0.5,), "std": (0.5,)}
    teacher = find_teacher(model, **about, teacher_name=name)
    run_precompute(folder / "S", world.shards, teacher, ["class_row,layers=last"])
    return folder / "S"


def answer(capsys: Any, *words: Any) -> tuple[dict[str, Any], str]:
    """What a command gives as JSON, and what it says."""
    with pytest.raises(SystemExit) as ended:
        main([*map(str, words), "--json"])
    said = capsys.readouterr()
    assert ended.value.code == 0, said.out + said.err
    return json.loads(said.out), said.err


def train(world: World, store: Path, out: Path, settings: dict[str, Any], *more: str) -> list[Any]:
    """The words of a run."""
    shards = [word for shard in world.shards for word in ("--shards", shard)]
    words = ["train", "--recipe", "scratch", *shards, "--val", world.shards[0], "--store", store, "--out", out, *more]
    return [
        *words,
        *[word for name, value in {**TRAINING, **settings}.items() for word in ("--set", f"{name}={value}")],
    ]


LACKS = "the student lacks parts of teacher dino2: LayerScale (--set student.args.init_values=1e-5)"


def test_dinov2_and_a_plain_vit_are_warned_of_and_a_student_like_it_is_not(world, store, tmp_path, capsys) -> None:
    _, said = answer(capsys, *train(world, store, tmp_path / "plain", PLAIN, "--smoke"))
    assert f"warning: {LACKS}" in said
    assert "To take all of them: --set student.like=dino2" in said
    _, said = answer(capsys, *train(world, store, tmp_path / "alike", {"student.like": "dino2", **SMALLER}, "--smoke"))
    assert "lacks" not in said
    _, about = load_student(tmp_path / "alike" / "last.safetensors")
    assert (about.model, about.arguments["depth"]) == ("vit_small_patch14_dinov2", 2)
    no_attention = {**PLAIN, "losses.guidance": "null"}
    _, said = answer(capsys, *train(world, store, tmp_path / "labels", no_attention, "--smoke"))
    assert "lacks" not in said


PROJECT = "{model: vit_tiny_patch16_224, img_size: 32, patch_size: 8, embed_dim: 24, num_heads: 2}"


@pytest.mark.parametrize(
    ("student", "target", "warned"),
    [
        (PROJECT, "class_row", True),
        pytest.param(PROJECT, "embedding", False, marks=pytest.mark.slow),
        pytest.param("{like: dino2, embed_dim: 24, num_heads: 2}", "class_row", False, marks=pytest.mark.slow),
        pytest.param("{img_size: 32, patch_size: 8}", "class_row", False, marks=pytest.mark.slow),
    ],
)
def test_so_is_by_plan_where_a_project_names_the_student(world, store, tmp_path, capsys, student, target, warned):
    teacher = (
        f"{{teacher: vit_small_patch14_dinov2, weights: {store.parent}/dino2.safetensors, input_size: 32, mean: 0.5"
    )
    content = f"""
shards: [{", ".join(world.shards)}]
store: {tmp_path}/T
views: {{policy: light, size: 32, count: 1}}
teachers:
  dino2: {teacher}, std: 0.5, args: {json.dumps({**SIZES, "num_classes": 3})}, targets: '{target}'}}
student: {student}
"""
    (tmp_path / "p.yaml").write_text(content)
    result, _ = answer(capsys, "plan", "--project", tmp_path / "p.yaml", "--measure", 0)
    warnings = result["teachers"]["dino2"]["warnings"]
    assert any("LayerScale (--set student.args.init_values=1e-5)" in line for line in warnings) == warned
    assert any("lacks" in line for line in warnings) == warned


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["like", "added"])
def test_such_a_student_trains_resumes_compiles_exports_and_loads_in_timm(
    world, tmp_path, monkeypatch, capsys, kind
) -> None:
    store = keep(world, tmp_path, "vit_small_patch16_dinov3", "dino3")
    settings = {"student.like": "dino3", **SMALLER} if kind == "like" else ADDED
    out = tmp_path / "run"
    _, said = answer(capsys, *train(world, store, out, settings))
    assert ("student lacks" in said) == (kind == "added"), "a plain ViT has no rotary positions"

    with monkeypatch.context() as patched:
        cut_after(patched, 6)
        with pytest.raises(SystemExit):
            main([*map(str, train(world, store, tmp_path / "cut", settings))])
    assert "Cut" in capsys.readouterr().err
    assert not (tmp_path / "cut" / "result.json").exists()
    answer(capsys, *train(world, store, tmp_path / "cut", settings, "--resume"))
    assert same(out, tmp_path / "cut")

    monkeypatch.setattr(precision, "BACKEND", "aot_eager")
    answer(capsys, *train(world, store, tmp_path / "fast", {**settings, "precision.torchcompile": "true"}))
    for ours, theirs in zip(log(out), log(tmp_path / "fast"), strict=True):
        assert theirs["losses"] == pytest.approx(ours["losses"], rel=1e-3)

    model, about = load_student(out / "last.safetensors")
    bare = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    batch = next(evaluation_batches(open_shards(world.shards), about.evaluation_policy, 64))
    with torch.no_grad():
        pixels = batch.pixels(about.mean, about.std)
        logits = model(pixels)
        assert torch.equal(bare(pixels), logits)
    names = bare.state_dict().keys()
    if kind == "like":
        assert {"reg_token", "blocks.1.gamma_1"} <= names
        assert type(bare.rope).__name__ == "RotaryEmbeddingDinoV3"
    else:
        assert {"reg_token", "pos_embed", "blocks.1.ls1.gamma"} <= names
        unseen = timm.create_model("vit_tiny_patch16_224", **about.arguments)
        assert not torch.equal(
            model.state_dict()["blocks.0.attn.qkv.weight"], unseen.state_dict()["blocks.0.attn.qkv.weight"]
        )
        assert np.allclose(model.state_dict()["pos_embed"][0, 5:], mae_2d(24, 4), atol=1e-5), "it was not trained"

    shards = [word for shard in world.shards for word in ("--shards", shard)]
    answer(capsys, "export", out, *shards, "--out", tmp_path / "s.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "s.onnx"), providers=["CPUExecutionProvider"])
    (given,) = session.run(["logits"], {"images": batch.images.numpy()})
    assert np.abs(given - logits.numpy()).max() <= 1e-4 * np.abs(logits.numpy()).max()

    printed = (out / "README.md").read_text().partition("It can be a teacher")[2].split("```")[1].replace("\\\n", " ")
    words = printed.replace("SHARDS", world.shards[0]).replace("STORE", str(store)).replace("NAME", "taught")
    monkeypatch.chdir(out)
    views = "--view-policy light --view-size 32 --num-views 1 --provider cpu --target logits,codec=f32"
    made, _ = answer(capsys, *shlex.split(words)[1:], *views.split())
    assert made["targets"][0].startswith("taught-logits-")
