"""A run's folder is one that timm loads by `local-dir:`, and gives the student's own logits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from precompute.taps import image_size
from storage.rng import generator
from storage.shards.shard import open_shards
from storage.testing import synthetic_image
from storage.views.policy import policy
from storage.views.render import render
from storage.views.view import View
from student.evaluation.batches import evaluation_batches
from student.models.attention_copy_hooks import AttentionCopyRecord
from student.models.build import build_student
from student.models.files import StudentDescription, load_student, save_student
from student.models.timm_folder import link_for_timm
from student.settings import StudentConfig
from tests.conftest import ROOT, World
from tests.student.runs import FULL, run, u8

if TYPE_CHECKING:
    from student.data.batch import Batch


@pytest.fixture(scope="module")
def taught(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("taught") / "run"
    run(world, out, "aal", u8(world), *FULL, "optim.lr=0.02")  # large: the best epoch may be the first
    return out


def answers(model: Any, batch: Batch) -> torch.Tensor:
    """Logits of evaluation views, by what timm says of the pixels."""
    feed = timm.data.resolve_model_data_config(model)
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(batch.pixels(feed["mean"], feed["std"]))
    return logits


def test_one_line_of_timm_gives_the_logits_of_the_last_epoch(world, taught) -> None:
    ours, about = load_student(taught / "last.safetensors")
    batch = next(evaluation_batches(open_shards(world.shards), policy(about.evaluation, about.img_size), 64))
    theirs = timm.create_model(f"local-dir:{taught}", pretrained=True)
    with torch.no_grad():
        assert torch.equal(answers(theirs, batch), ours(batch.pixels(about.mean, about.std)))
    assert theirs.pretrained_cfg["label_names"] == ["class0", "class1", "class2"]
    assert theirs.pretrained_cfg["input_size"] == (3, 32, 32)
    assert not {"tag", "license", "paper_ids"} & {name for name, value in theirs.pretrained_cfg.items() if value}, (
        "what timm says of its own weights is not true of these"
    )


@pytest.mark.parametrize("name", ["best", "ema"])
def test_the_others_of_the_folder_are_loaded_by_their_names(taught, name) -> None:
    file = taught / f"{name}.safetensors"
    theirs = timm.create_model(f"local-dir:{taught}", checkpoint_path=file).state_dict()
    expected = load_file(file)
    assert all(torch.equal(theirs[key], expected[key]) for key in expected)
    last = load_file(taught / "last.safetensors")
    if name == "ema":
        assert not all(torch.equal(last[key], expected[key]) for key in expected)


def test_the_guide_s_lines_run_beside_the_folder(taught, tmp_path, monkeypatch) -> None:
    guide = (ROOT / "docs" / "guide.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", guide, re.DOTALL) if "local-dir" in block)
    (tmp_path / "run").symlink_to(taught)
    monkeypatch.chdir(tmp_path)
    made: dict[str, Any] = {}
    exec(code, made)
    theirs, expected = made["model"].state_dict(), load_file(taught / "best.safetensors")
    assert all(torch.equal(theirs[key], expected[key]) for key in expected)


def test_nothing_is_stored_twice(taught) -> None:
    link = taught / "model.safetensors"
    assert link.is_symlink()
    assert link.readlink() == Path("last.safetensors"), "it still leads there when the folder is moved"
    assert link.lstat().st_size + (taught / "config.json").stat().st_size < 2048


def test_timm_prepares_a_photograph_as_the_evaluation_view_does(taught) -> None:
    """At a size where both round alike; timm scales to whole pixels before it crops."""
    config = json.loads((taught / "config.json").read_text())["pretrained_cfg"]
    photo = synthetic_image(1, generator("photo"), (400, 320))
    transform = timm.data.create_transform(
        (3, 224, 224),
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        crop_pct=0.875,
        **{name: config[name] for name in ("interpolation", "crop_mode")},
    )
    seen = (transform(photo).permute(1, 2, 0) * 255).round().numpy()
    short = 320 * 0.875
    box = ((400 - short) / 2, (320 - short) / 2, (400 + short) / 2, (320 + short) / 2)
    ours = render(photo, View(box=box), 224)
    assert np.abs(seen - ours).mean() < 1
    assert np.abs(seen - np.asarray(photo.resize((224, 224), Image.Resampling.BICUBIC))).mean() > 5


OTHERS: dict[str, tuple[dict[str, Any], int]] = {
    "a CNN on images of another size": ({"model": "test_efficientnet", "img_size": 64}, 3),
    "a CNN with a stem of its own": ({"model": "resnet10t", "img_size": 64}, 3),
    "two heads": ({"model": "deit_tiny_distilled_patch16_224", "img_size": 32, "depth": 2}, 5),
    "no classifier": ({"model": "test_vit", "img_size": 64, "global_pool": "avg"}, 0),
    "heads that no shape tells": ({"model": "test_vit", "img_size": 32, "patch_size": 4, "num_heads": 8}, 3),
    "dropout": ({"model": "test_vit", "drop_path_rate": 0.2, "drop_rate": 0.1, "attn_drop_rate": 0.1}, 3),
    "a wider ViT with attention pooling": ({"model": "test_vit", "mlp_ratio": 2.0, "global_pool": "map"}, 3),
    "parts of DINOv2's students": (
        {"model": "test_vit", "img_size": 64, "args": {"init_values": 1e-5, "reg_tokens": 2, "pos_embed": "sincos"}},
        3,
    ),
    "a small DINOv3": ({"like": "vit_small_patch16_dinov3", "img_size": 64, "embed_dim": 48, "num_heads": 3}, 3),
    "a hierarchical ViT": ({"model": "test_convnext"}, 3),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_so_does_every_other_network_that_timm_builds(tmp_path, kind) -> None:
    settings, classes = OTHERS[kind]
    chosen = StudentConfig(**settings)
    torch.manual_seed(0)
    model, arguments = build_student(chosen, classes)
    side = chosen.img_size or image_size(model)
    names = tuple(f"class {n}" for n in range(classes)) or None
    about = StudentDescription(
        model=chosen.model,
        arguments=arguments,
        img_size=side,
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.25),
        classes=names,
        evaluation="short(1)|center",
    )
    save_student(tmp_path / "last.safetensors", model, about)
    link_for_timm(tmp_path, "last.safetensors", about)
    ours, _ = load_student(tmp_path / "last.safetensors")
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        assert torch.equal(theirs(images), ours(images))
    feed = timm.data.resolve_model_data_config(theirs)
    assert (feed["input_size"], feed["crop_pct"]) == ((3, side, side), 1)
    assert (tuple(feed["mean"]), tuple(feed["std"])) == (about.mean, about.std)
    assert theirs.num_classes == classes


def test_a_link_follows_what_the_file_becomes(world, taught, tmp_path) -> None:
    """A run whose end is written twice, as after a kill between the two."""
    model, about = load_student(taught / "last.safetensors")
    for bias in (1.0, 2.0):
        torch.nn.init.constant_(model.get_parameter("head.bias"), bias)
        save_student(tmp_path / "last.safetensors", model, about)
        link_for_timm(tmp_path, "last.safetensors", about)
        theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
        assert (theirs.head.bias == bias).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "last.safetensors", "model.safetensors"]


def test_a_file_system_without_links_gets_a_copy(taught, tmp_path, monkeypatch) -> None:
    model, about = load_student(taught / "last.safetensors")
    save_student(tmp_path / "last.safetensors", model, about)

    def refuse(self: Path, target: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    link_for_timm(tmp_path, "last.safetensors", about)
    assert not (tmp_path / "model.safetensors").is_symlink()
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "last.safetensors").read_bytes()


def test_a_run_takes_the_place_of_a_smoke_run_with_all_that_it_left(world, tmp_path) -> None:
    run(world, tmp_path / "run", "scratch", "student.num_heads=6", smoke=True)
    before = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True)
    run(world, tmp_path / "run", "scratch", "optim.epochs=1")
    after = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True)
    assert (before.blocks[0].attn.num_heads, after.blocks[0].attn.num_heads) == (6, 3)


def test_what_timm_alone_cannot_build_is_told_by_its_description(taught) -> None:
    _, about = load_student(taught / "last.safetensors")
    assert about.plain_timm
    assert not about.model_copy(update={"shifted_patches": True}).plain_timm
    copies = {"layers": [1], "heads": 1, "settings": {"tensors": "map"}, "store": "s", "teacher": "t", "permute": None}
    copies |= {"targets": ["id"], "graphs": [["0" * 64, 0]]}
    record = AttentionCopyRecord.model_validate(copies)
    assert not about.model_copy(update={"attention_copy": record}).plain_timm
