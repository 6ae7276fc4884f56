"""What an error proposes is not refused in turn: each proposal is followed until the run goes through."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest

from precompute.teachers import teacher as teachers
from storage.errors import UserError
from storage.store.store import Store
from tests.conftest import World, run_precompute, teacher_of, write_teacher
from tests.precompute.stores import seeded
from tests.student.runs import run, u8

if TYPE_CHECKING:
    from pathlib import Path

SIZES = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3}


def refused(world: World, out: Path, recipe: str, *settings: str, **parts: Any) -> str:
    with pytest.raises(UserError) as error:
        run(world, out, recipe, *settings, **parts)
    return str(error.value)


def proposed(text: str) -> list[str]:
    """The settings in an error, in their order."""
    return re.findall(r"`([\w.]+=\w+)`", text)


@pytest.mark.parametrize("recipe", ["seed", "compress", "simreg"])
@pytest.mark.parametrize("model", ["resnet10t", "test_efficientnet"])
def test_a_student_without_tokens_is_told_which_sizes_it_does_not_take_and_never_of_attention(
    world: World, tmp_path: Path, recipe: str, model: str
) -> None:
    settings = [f"student.model={model}", "optim.epochs=1"]
    said = refused(world, tmp_path / "run", recipe, *settings)
    assert "cannot be made" in said
    assert "attention" not in said
    *nothing, plain = proposed(said)
    assert nothing
    assert all(setting.endswith("=null") for setting in nothing), said
    assert run(world, tmp_path / "run", recipe, *settings, *nothing)["epochs"] == 1
    assert run(world, tmp_path / "plain", recipe, *settings, plain)["epochs"] == 1


def test_a_cnn_learns_from_labels_and_logits(world: World, tmp_path: Path) -> None:
    sizes = ["student.patch_size=null", "student.embed_dim=null", "student.depth=null", "student.num_heads=null"]
    settings = ["student.model=resnet10t", *sizes, "losses.deit.same_classes=true", "optim.epochs=1"]
    assert run(world, tmp_path / "run", "deit-soft", *settings)["samples"]


def test_a_vit_with_relative_positions_trains_by_its_tokens_and_by_its_attention(world: World, tmp_path: Path) -> None:
    beit = "student.model=beit_base_patch16_224"  # they are a bias on its attention
    assert run(world, tmp_path / "run", "simreg", beit, "optim.epochs=1")["epochs"] == 1
    assert run(world, tmp_path / "attention", "aal", beit, u8(world), "optim.epochs=1")["epochs"] == 1


def test_a_student_of_windows_is_told_to_be_a_plain_vit(world: World, tmp_path: Path) -> None:
    swin = ["student.model=swin_tiny_patch4_window7_224", "student.depth=null", "student.num_heads=null"]
    said = refused(world, tmp_path / "other", "aal", *swin, "student.embed_dim=24")
    assert said.startswith("aal reads the student's attention: SwinTransformer: ")
    assert proposed(said) == ["student.model=vit_tiny_patch16_224"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("theirs", "mine"),
    [
        ("vit_base_patch16_gap_224", "vit_tiny_patch16_224"),
        ("vit_base_patch16_gap_224", "deit_tiny_distilled_patch16_224"),
        ("vit_base_patch16_siglip_224", "vit_tiny_patch16_224"),
        ("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"),
        ("vit_small_patch14_reg4_dinov2", "deit_tiny_distilled_patch16_224"),
    ],
)
def test_the_student_that_is_proposed_can_copy_from_this_teacher(
    world: World, tmp_path: Path, theirs: str, mine: str
) -> None:
    place = seeded(world, tmp_path / "store")
    weights = write_teacher(tmp_path / "teacher.safetensors", (theirs, SIZES))
    teacher = teachers.find_teacher(
        theirs,
        weights=weights,
        arguments={**SIZES, "num_classes": 3},
        input_size=32,
        mean=(0.5,),
        std=(0.5,),
        teacher_name="t",
    )
    run_precompute(place, world.shards, teacher, ["attention"])
    settings = [
        "attention_copy.tensors=map",
        "attention_copy.average=examples",
        "student.global_pool=null",
        "optim.epochs=1",
    ]
    parts = {"store": Store.open(place), "val": world.shards}
    said = refused(world, tmp_path / "run", "attention-copy", f"student.model={mine}", *settings, **parts)
    assert "every token of a copied layer needs the teacher's attention" in said
    (other,) = proposed(said)
    assert other != f"student.model={mine}"
    assert run(world, tmp_path / "run", "attention-copy", other, *settings, **parts)["samples"]


@pytest.mark.slow
def test_targets_that_are_missing_are_named_with_what_a_teacher_without_them_gives(
    world: World, tmp_path: Path
) -> None:
    place = tmp_path / "store"
    cnn = teacher_of(world.weights, "cnn")
    run_precompute(place, world.shards, cnn, ["logits"])
    parts = {"store": Store.open(place)}
    said = refused(world, tmp_path / "run", "seed", **parts)
    targets = re.findall(r"target=(\w+)", said)
    assert targets == ["class_token", "embedding"], said
    assert re.findall(r"target=(\w+)", refused(world, tmp_path / "run", "seed", store=None)) == targets
    with pytest.raises(UserError, match="has no attention over all tokens of an image"):
        run_precompute(place, world.shards, cnn, targets[:1])
    run_precompute(place, world.shards, cnn, targets[1:])
    assert run(world, tmp_path / "run", "seed", "optim.epochs=1", **parts)["epochs"] == 1
