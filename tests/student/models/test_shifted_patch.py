"""Students with shifted patches: what a token sees, and that such a student is trained, kept, loaded and used."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from safetensors import safe_open
from torch import nn

from pipeline.cli import main
from pipeline.export_onnx import export
from storage.errors import UserError
from storage.objects.state_dict import load_weights
from storage.objects.weights_file import WeightsFile
from storage.shards.shard import open_shards
from storage.views.policy import policy
from student.alignment.student_spec import student_spec
from student.evaluation.batches import evaluation_batches
from student.models.build import build_student
from student.models.files import load_student
from student.models.shifted_patch import ShiftedPatches, shift_patches, shifted
from student.settings import StudentConfig
from tests.student.runs import run, u8
from tests.typed import grad

if TYPE_CHECKING:
    from pathlib import Path


def test_an_image_is_shifted_by_half_a_patch_in_four_diagonals() -> None:
    image = torch.arange(1.0, 2 * 3 * 64 + 1).view(2, 3, 8, 8)
    found = shifted(image, 2).unflatten(1, (5, 3))
    assert torch.equal(found[:, 0], image)
    for number, (down, right) in enumerate(((2, 2), (2, -2), (-2, 2), (-2, -2)), 1):
        rolled = image.roll((down, right), (2, 3))
        outside = torch.zeros(8, 8, dtype=torch.bool)
        outside[slice(0, 2) if down > 0 else slice(6, 8)] = True
        outside[:, slice(0, 2) if right > 0 else slice(6, 8)] = True
        assert torch.equal(found[:, number], rolled.masked_fill(outside, 0)), "what comes from outside is zero"


def test_a_token_is_the_normed_values_of_its_patch_in_all_five_projected() -> None:
    torch.manual_seed(0)
    layer = ShiftedPatches(3, 4, 6)
    nn.init.normal_(layer.norm.weight)
    images = torch.randn(2, 3, 8, 8)
    found = layer(images)
    assert found.shape == (2, 6, 2, 2)
    seen = shifted(images, 2)[:, :, 4:8, 0:4].flatten(1)  # the patch in row 1, column 0
    assert torch.allclose(found[:, :, 1, 0], layer.linear(layer.norm(seen)), atol=1e-6)
    before = images.clone().requires_grad_()
    layer(before)[:, :, 1, 0].sum().backward()
    touched = grad(before).abs().sum((0, 1)) > 0
    assert touched[2:, :6].all(), "half a patch around it is seen, within the image"
    assert touched.sum() == 6 * 6


def test_only_the_projection_of_patches_is_another() -> None:
    settings = StudentConfig(img_size=32, patch_size=4, embed_dim=48, depth=2, num_heads=3)
    torch.manual_seed(0)
    plain, _ = build_student(settings, 3)
    torch.manual_seed(0)
    changed, arguments = build_student(settings.model_copy(update={"shifted_patches": True}), 3)
    made: Any = changed
    assert arguments["patch_size"] == 4
    others = [{n: t for n, t in m.state_dict().items() if not n.startswith("patch_embed")} for m in (plain, made)]
    assert all(torch.equal(others[0][name], others[1][name]) for name in others[0])
    assert made.patch_embed.proj.linear.weight.shape == (48, 15 * 16)
    assert student_spec(made).grid == 8, "its attention can be taught as that of any ViT"


@pytest.mark.parametrize(
    "settings",
    [{"model": "resnet10t"}, {"model": "efficientnet_b1"}, {"img_size": 4, "patch_size": 1, "depth": 1}],
)
def test_networks_without_patches_are_refused(settings) -> None:
    with pytest.raises(UserError, match="does not cut images into square patches of two pixels or more"):
        build_student(StudentConfig(shifted_patches=True, **settings), 3)


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shifted") / "run"
    run(world, out, "aal", u8(world), "model_ema_decay=0.9", "student.shifted_patches=true", "optim.epochs=1")
    return out


def test_it_is_loaded_evaluated_and_exported_as_it_was_trained(world, trained, tmp_path, capsys) -> None:
    model, about = load_student(trained / "last.safetensors")
    assert about.shifted_patches
    assert isinstance(model.get_submodule("patch_embed.proj"), ShiftedPatches)
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "evaluate",
                "accuracy",
                str(trained),
                *[part for shard in world.shards for part in ("--shards", shard)],
                "--json",
            ]
        )
    assert ended.value.code == 0
    result = json.loads((trained / "result.json").read_text())
    assert json.loads(capsys.readouterr().out)["top1"] == result["top1"]
    export(trained / "last.safetensors", world.shards, tmp_path / "s.onnx")
    batch = next(evaluation_batches(open_shards(world.shards), policy(about.evaluation, about.img_size), 8))
    (logits,) = onnxruntime.InferenceSession(tmp_path / "s.onnx").run(["logits"], {"images": batch.images.numpy()})
    with torch.no_grad():
        expected = model(batch.pixels(about.mean, about.std)).numpy()
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()


def test_its_card_says_that_no_bare_network_takes_its_weights(trained, monkeypatch) -> None:
    text = (trained / "README.md").read_text()
    assert "fit no bare `vit_tiny_patch16_224`" in text
    assert "create_model" not in text
    assert "can be a teacher" not in text
    assert "there is no `config.json` for timm" in text
    assert not {"config.json", "model.safetensors"} & {path.name for path in trained.iterdir()}
    monkeypatch.chdir(trained)
    made: dict[str, Any] = {}
    exec(text.partition("```python\n")[2].partition("```")[0], made)
    assert isinstance(made["model"].patch_embed.proj, ShiftedPatches)
    _, about = load_student(trained / "last.safetensors")
    with pytest.raises(UserError, match=r"missing \(patch_embed.proj.weight"):
        load_weights(timm.create_model(about.model, **about.arguments), WeightsFile(trained / "last.safetensors"))


def test_it_is_not_pushed_to_where_timm_would_load_it(trained, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["export", str(trained), "--push-to-hub", "alice/shifted"])
    assert ended.value.code == 1
    assert "timm alone cannot build this student (its patches are shifted)" in capsys.readouterr().err


def test_a_student_without_them_is_kept_as_ever(world, tmp_path) -> None:
    run(world, tmp_path / "run", "scratch", smoke=True)
    with safe_open(tmp_path / "run" / "last.safetensors", "pt") as file:
        assert "shifted_patches" not in file.metadata()
    assert not load_student(tmp_path / "run" / "last.safetensors")[1].shifted_patches


def test_weights_of_its_own_kind_and_of_bare_networks(world, trained, tmp_path) -> None:
    own = f"student.weights={trained / 'last.safetensors'}"
    run(world, tmp_path / "own", "scratch", own, "student.shifted_patches=true", smoke=True)
    run(world, tmp_path / "bare", "scratch", smoke=True)
    bare = f"student.weights={tmp_path / 'bare' / 'last.safetensors'}"
    with pytest.raises(UserError, match=r"missing \(patch_embed.proj.norm.weight.*\n  Take what fits.*student.init="):
        run(world, tmp_path / "other", "scratch", bare, "student.shifted_patches=true", smoke=True)
    fits = 'student.init=["cls_token", "pos_embed", "blocks.*", "norm.*", "head.*"]'
    run(world, tmp_path / "other", "scratch", bare, "student.shifted_patches=true", fits, smoke=True)


def test_shift_patches_leaves_no_trace_of_the_convolution() -> None:
    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, patch_size=8, num_classes=3)
    shift_patches(model)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    assert [n for n in model.state_dict() if n.startswith("patch_embed")] == [
        f"patch_embed.proj.{part}" for part in ("norm.weight", "norm.bias", "linear.weight", "linear.bias")
    ]
