"""Students with further arguments of timm's constructor, with a teacher's architecture, and with fixed positions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import timm
from pydantic import ValidationError

from pipeline.recipes.loader import load_recipe
from storage.errors import UserError
from storage.objects.state_dict import ONNX_FILE
from storage.store.manifests import TeacherIdentity
from student.models.build import architecture, build_student
from student.settings import StudentConfig

if TYPE_CHECKING:
    import torch

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def identity(model: str, **arguments: Any) -> TeacherIdentity:
    half = (0.5, 0.5, 0.5)
    return TeacherIdentity(
        model=model, arguments=arguments, weights_sha256="0" * 64, input_size=32, mean=half, std=half
    )


def shapes(model: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def test_arguments_reach_timm_s_constructor() -> None:
    args = {"init_values": 0.25, "qk_norm": True, "reg_tokens": 2, "pre_norm": True, "dynamic_img_size": True}
    model, arguments = build_student(StudentConfig(**SMALL, args=args), 3)
    expected = timm.create_model("vit_tiny_patch16_224", num_classes=3, **SMALL, **args)
    assert shapes(model) == shapes(expected)
    assert arguments == {**SMALL, **args, "num_classes": 3}
    assert float(model.state_dict()["blocks.0.ls1.gamma"][0]) == 0.25


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"args": {"init_value": 1}}, ("student.args.init_value: ", "no such argument", "Did you mean 'init_values'?")),
        ({"model": "deit_tiny_distilled_patch16_224", "args": {"qknorm": True}}, ("Did you mean 'qk_norm'?",)),
        ({"args": {"num_reg_tokens": 4}}, ("has no such argument", "Did you mean 'reg_tokens'?")),
        ({"args": {"init_values": "small"}}, ("cannot be made", "Change `student.args.init_values=VALUE`")),
        ({"args": {"class_token": False}}, ("needs the class token", "Change `student.args.class_token=VALUE`")),
        ({"args": {"checkpoint_path": "f.pth"}}, ("student.args.checkpoint_path: not an argument of a network",)),
        ({"args": {"features_only": True}}, ("student.args.features_only: not an argument",)),
        ({"like": "vit_small_patch16_dinov4"}, ("student.like: timm has no 'vit_small", "dinov3'?")),
        ({"like": "vit_small_patch16_dinov3", "args": {"pos_embed": "sincos"}}, ("Eva adds no position embeddings",)),
        ({"embed_dim": 18, "num_heads": 3, "args": {"pos_embed": "sincos"}}, ("needs a width of 4·n", "embed_dim=16")),
    ],
)
def test_what_timm_does_not_take_is_named(settings: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        build_student(architecture(StudentConfig(**settings), None), 3)
    for part in words:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"args": {"depth": 3}}, "args.depth: this has a setting of its own: `student.depth=3`"),
        ({"depth": 2, "args": {"depth": 2}}, "args.depth: this has a setting of its own"),
        ({"model": "vit_tiny_patch16_224", "like": "vit_small_patch16_dinov3"}, "model and like are both given"),
        ({"args": [1]}, "valid dictionary"),
    ],
)
def test_what_is_said_in_two_places_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        StudentConfig(**settings)


def test_numbers_that_yaml_takes_for_words_and_nulls() -> None:
    recipe = load_recipe("scratch", ["student.args={init_values: 1e-5, qk_norm: null, pos_embed: learn}"])
    assert recipe.student.args == {"init_values": 1e-5, "pos_embed": "learn"}
    assert load_recipe("scratch", ["student.args.init_values=1e-5"]).student.args == {"init_values": 1e-5}
    assert load_recipe("scratch").student.model_dump(exclude_defaults=True).keys() == {"model", "drop_path_rate"}


def test_like_over_a_recipe_s_model_and_a_model_over_like() -> None:
    alike = load_recipe("aal-small", ["student.like=vit_small_patch16_dinov3"]).student
    assert (alike.like, alike.model, alike.patch_size) == ("vit_small_patch16_dinov3", "vit_small_patch16_dinov3", 4)
    assert StudentConfig(**alike.model_dump(mode="json")) == alike, "args.yaml is a recipe again"
    both = ["student.like=vit_small_patch16_dinov3", "student.model=vit_small_patch16_224"]
    assert load_recipe("aal-small", both).student.like is None


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_small_patch14_dinov2.lvd142m", "dino_vit_s16"])
def test_like_is_timm_s_network_with_other_sizes(name: str) -> None:
    model, _ = build_student(architecture(StudentConfig(like=name, **SMALL), None), 0)
    full = "vit_small_patch16_224.dino" if name == "dino_vit_s16" else name
    assert shapes(model) == shapes(timm.create_model(full, num_classes=0, **SMALL))


def test_like_a_teacher_of_the_store_takes_its_arguments_too() -> None:
    teacher = identity("vit_base_patch16_224", num_classes=1000, depth=4, embed_dim=96, reg_tokens=3, qk_norm=True)
    settings = StudentConfig(like="mine", img_size=32, patch_size=8, embed_dim=48, num_heads=3, args={"reg_tokens": 1})
    model, arguments = build_student(architecture(settings, teacher), 5)
    own = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 5}
    assert arguments == {**own, "reg_tokens": 1, "qk_norm": True}
    assert shapes(model) == shapes(timm.create_model("vit_base_patch16_224", **arguments))


@pytest.mark.parametrize(("model", "kind"), [(ONNX_FILE, "a ready graph"), ("local-dir:/run", "local-dir:/run")])
def test_like_a_network_outside_timm_is_refused(model: str, kind: str) -> None:
    with pytest.raises(UserError, match=rf"student\.like: mine is {kind}, which"):
        architecture(StudentConfig(like="mine"), identity(model))


# As in facebookresearch/mae, util/pos_embed.py.
def mae_1d(width: int, positions: np.ndarray) -> np.ndarray:
    omega = 1.0 / 10000 ** (np.arange(width // 2, dtype=float) / (width / 2.0))
    out = np.einsum("m,d->md", positions.reshape(-1), omega)
    return np.concatenate([np.sin(out), np.cos(out)], axis=1)


def mae_2d(width: int, side: int) -> np.ndarray:
    grid = np.stack(np.meshgrid(np.arange(side, dtype=np.float32), np.arange(side, dtype=np.float32)), axis=0)
    return np.concatenate([mae_1d(width // 2, grid[0]), mae_1d(width // 2, grid[1])], axis=1)


@pytest.mark.parametrize("args", [{}, {"reg_tokens": 2}, {"reg_tokens": 2, "no_embed_class": True}])
def test_fixed_positions_are_mae_s_and_are_not_trained(args: dict[str, Any]) -> None:
    sizes = {**SMALL, "img_size": 56}
    model, arguments = build_student(StudentConfig(**sizes, args={"pos_embed": "sincos", **args}), 3)
    positions: Any = model.pos_embed
    before = positions.shape[1] - 49
    assert before == (0 if "no_embed_class" in args else 1 + args.get("reg_tokens", 0))
    assert np.allclose(positions[0, before:].detach(), mae_2d(48, 7), atol=1e-5)
    assert not positions[0, :before].any()
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["pos_embed"]
    timm.create_model("vit_tiny_patch16_224", **arguments).load_state_dict(model.state_dict())
