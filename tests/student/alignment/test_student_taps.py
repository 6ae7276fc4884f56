"""What is read of a student, and how it meets what a store keeps of a teacher: equal networks give equal tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import timm
import torch

from precompute.taps import Tap, TappedTeacher
from storage.errors import UserError
from student.alignment.student_spec import student_spec
from student.alignment.student_taps import StudentTap, StudentTaps
from student.alignment.tokens import TokenAligner
from student.losses.attention_transfer import AttentionTransferConfig
from tests.manifests import stored

if TYPE_CHECKING:
    from student.targets.stored_target import StoredTarget

READS: frozenset[StudentTap] = frozenset({"attention", "values", "streams", "tokens"})
LAYERS = (1, 2, 3)


def network(**more: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 2}
    return timm.create_model("vit_tiny_patch16_224", **{**sizes, **more}).eval()


def given(tap: str, target: torch.Tensor, layers: tuple[int, ...] | None = LAYERS) -> StoredTarget:
    return stored(tap, target.shape[1:], layers, {"layers": 3, "prefix": ["class"]})


@pytest.mark.parametrize("tap", ["q", "k", "v", "tokens", "final"])
def test_a_student_that_is_its_teacher_has_the_teacher_s_vectors(tap: str) -> None:
    model = network()
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    wanted = Tap("tokens") if tap == "final" else Tap(tap, layers=LAYERS)
    teacher = TappedTeacher(network(), [wanted], 32, input_size=32, mean=(0.5,) * 3, std=(0.5,) * 3).eval()
    (target,) = teacher(images)
    with StudentTaps(model, READS, student_spec(model).attention) as seen:
        model(teacher.prepare(images)).sum().backward()
    mine = {**{part: seen.vectors(part) for part in "qkv"}, "tokens": seen.streams, "final": [seen.tokens] * 3}[tap]
    settings = AttentionTransferConfig(layers="last" if tap == "final" else None)
    meeting = TokenAligner("it", settings, student_spec(model), [given(wanted.name, target, wanted.layers)])
    assert torch.equal(meeting.student_vectors(mine), meeting.teacher_vectors(target))
    assert meeting.student_vectors(mine).requires_grad


def test_the_final_tokens_are_the_last_stream_after_the_norm() -> None:
    model = network()
    pixels = torch.randn(2, 3, 32, 32)
    with StudentTaps(model, READS, student_spec(model).attention) as seen:
        features = model.forward_features(pixels)
    assert torch.equal(seen.tokens, features)
    assert torch.equal(model.norm(seen.streams[-1]), features)
    seen.clear()
    assert not seen.streams


def test_vectors_of_tokens_meet_by_role_and_place() -> None:
    """The student has a distillation token too, and a finer grid."""
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=32, patch_size=4, embed_dim=48, depth=3, num_heads=3
    ).eval()
    target = torch.randn(2, 3, 3, 17, 16)
    shape = student_spec(model)
    meeting = TokenAligner("it", AttentionTransferConfig(layers="uniform", grid="bicubic"), shape, [given("v", target)])
    with StudentTaps(model, frozenset({"values"}), shape.attention) as seen:
        model(torch.randn(2, 3, 32, 32))
    mine, theirs = meeting.student_vectors(seen.vectors("v")), meeting.teacher_vectors(target)
    assert mine.shape == theirs.shape == (2, 3, 3, 65, 16)
    assert torch.equal(mine[:, 0, :, 0], seen.vectors("v")[0][:, :, 0])
    assert torch.equal(mine[:, 0, :, 1:], seen.vectors("v")[0][:, :, 2:])
    assert torch.equal(theirs[..., 0, :], target[..., 0, :])
    plane = torch.full((2, 3, 3, 17, 16), 0.5)
    assert torch.allclose(meeting.teacher_vectors(plane), torch.tensor(0.5), atol=1e-6)
    assert "left out: student's distillation" in meeting.row.rule


def test_heads_of_vectors_are_never_merged() -> None:
    target = torch.randn(2, 3, 3, 17, 16)
    with pytest.raises(UserError, match="vectors of different heads cannot be merged"):
        TokenAligner("it", AttentionTransferConfig(heads="mean"), student_spec(network()), [given("v", target)])
    first = TokenAligner(
        "it", AttentionTransferConfig(heads="first"), student_spec(network(num_heads=2)), [given("v", target)]
    )
    assert first.teacher_vectors(target).shape == (2, 3, 2, 17, 16)


def test_a_network_without_tokens_is_refused() -> None:
    with pytest.raises(UserError, match="not a plain ViT, whose blocks keep one token for each patch"):
        StudentTaps(timm.create_model("resnet18"), frozenset({"tokens"}))


def test_blocks_without_the_class_token_are_no_layers() -> None:
    """CaiT: its last layers let the class token attend, its blocks have none."""
    model = timm.create_model("cait_xxs24_224", img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3).eval()
    shape = student_spec(model)
    assert (shape.layers, shape.prefix) == (2, ("class",))
    with pytest.raises(UserError, match="of its 3 blocks 2 attend over all tokens"):
        StudentTaps(model, frozenset({"streams"}), shape.attention)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "nest_tiny", "gcvit_xxtiny"])
def test_windows_are_no_attention_over_all_patches_of_a_stage(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    with pytest.raises(UserError, match="it pools its patches between layers"):
        student_spec(model)
