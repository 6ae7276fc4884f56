"""What a student lacks of its teacher's architecture, compared with the arguments that both are made with."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import yaml

from storage.objects.state_dict import ONNX_FILE
from student.alignment.native_parts import missing_parts
from student.models.build import architecture, build_student
from student.settings import StudentConfig
from tests.student.models.test_student_args import SMALL, identity


def student(**settings: Any) -> torch.nn.Module:
    with torch.device("meta"):
        return build_student(StudentConfig(**{**SMALL, **settings}), 0)[0]


PARTS: dict[str, dict[str, Any]] = {
    "LayerScale": {"init_values": 1e-5},
    "qk-norm": {"qk_norm": True},
    "register tokens": {"reg_tokens": 3},
    "a norm before its layers": {"pre_norm": True},
}


@pytest.mark.parametrize("chosen", [["LayerScale"], ["qk-norm", "register tokens"], [*PARTS], []])
def test_exactly_the_parts_that_are_missing_are_named_with_what_adds_them(chosen: list[str]) -> None:
    arguments = {name: value for part in chosen for name, value in PARTS[part].items()}
    teacher = identity("vit_base_patch16_224", **SMALL, **arguments)
    said = missing_parts(student(), teacher, "it") or ""
    assert [part for part in PARTS if part in said] == [part for part in PARTS if part in chosen]
    pairs = re.findall(r"`student\.args\.(\w+)=(\S+)`", said)
    assert {name for name, _ in pairs} == {*arguments}
    args = {name: yaml.safe_load(value) for name, value in pairs}
    assert missing_parts(student(args=args), teacher, "it") is None, "what it says helps"
    assert ("`student.like=it`" in said) == ("2605.07191" in said) == bool(chosen)


NONE = "this network has no setting for it"
FAMILIES = {
    "vit_small_patch14_dinov2": ["LayerScale (`student.args.init_values=1e-5`)"],
    "vit_small_patch16_dinov3": [
        "register tokens (`student.args.reg_tokens=4`)",
        "LayerScale",
        f"rotary positions ({NONE}).",
    ],
    "vit_base_patch16_clip_224": ["a norm before its layers (`student.args.pre_norm=true`)"],
    "beit_base_patch16_224": ["LayerScale", f"relative positions ({NONE})."],
    "eva02_tiny_patch14_224": ["rotary positions", f"SwiGLU ({NONE})."],
    "vit_small_patch16_224.dino": [],
    "resnet18": [],
    "vit_of_another_version": [],
    ONNX_FILE: [],
}


@pytest.mark.parametrize("model", FAMILIES)
def test_families_and_a_student_like_each(model: str) -> None:
    sizes = SMALL if FAMILIES[model] else {}
    teacher = identity(model, **sizes)
    said = missing_parts(student(), teacher, "it")
    assert (said is None) == (not FAMILIES[model])
    assert all(part in str(said) for part in FAMILIES[model])
    if said:
        with torch.device("meta"):
            alike, _ = build_student(architecture(StudentConfig(like="it"), teacher), 0)
        assert missing_parts(alike, teacher, "it") is None


def test_a_class_token() -> None:
    gap = student(model="vit_base_patch16_gap_224")
    assert "a class token" in str(missing_parts(gap, identity("vit_base_patch16_224", **SMALL), "it"))


def test_a_teacher_s_manifest_cannot_have_a_file_loaded() -> None:
    teacher = identity("vit_small_patch14_dinov2", **SMALL, checkpoint_path="/nowhere/evil.pth")
    assert "LayerScale" in str(missing_parts(student(), teacher, "it"))
