"""Cost: parameters that are known, multiply-adds counted by hand, links as a run left them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from pipeline.cli import main
from precompute.capabilities import bare
from storage.errors import UserError
from student.alignment.student_taps import attention_modules
from student.evaluation.cost import cost, links_of
from tests.student.runs import run

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("name", "classes", "parameters"),
    [
        ("vit_tiny_patch16_224", 10, 5_526_346),
        ("vit_small_patch16_224", 10, 21_669_514),
        ("vit_base_patch16_224", 10, 85_806_346),
        ("deit_tiny_distilled_patch16_224", 10, 5_528_660),
        ("deit_small_distilled_patch16_224", 10, 21_674_132),
        ("deit_small_distilled_patch16_224", 1000, 22_436_432),
        ("pit_s_224", 10, 22_890_682),
    ],
)
def test_parameters_are_those_that_are_printed(name, classes, parameters) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=classes).eval()
        assert cost(model, torch.zeros(1, 3, 224, 224)).parameters == parameters


def test_multiply_adds_are_those_counted_by_hand() -> None:
    """Patches, then in each layer qkv, two products of attention, projection and MLP, then the head."""
    width, depth, tokens, classes = 192, 12, 197, 10
    layer = tokens * width * width * (3 + 1 + 4 + 4) + 2 * tokens * tokens * width
    expected = 196 * 3 * 16 * 16 * width + depth * layer + width * classes
    model = timm.create_model("vit_tiny_patch16_224", num_classes=classes).eval()
    before = [module.fused_attn for module in attention_modules(model)]
    assert cost(model, torch.zeros(1, 3, 224, 224)).macs == expected
    assert [module.fused_attn for module in attention_modules(model)] == before
    _, size, teacher = bare("effnet_b3")
    assert size == 224
    with torch.device("meta"):
        assert cost(teacher, torch.zeros(1, 3, 224, 224)).macs == pytest.approx(0.96e9, rel=0.01)


def test_multiply_adds_of_pit_are_those_counted_by_hand() -> None:
    """Overlapping patches, layers of three widths and grids; between them a depthwise convolution, a linear layer."""
    model = timm.create_model("pit_s_224", num_classes=10).eval()
    expected, before = 27**2 * 3 * 16 * 16 * 144 + 576 * 10, 0
    for width, depth, grid in ((144, 2, 27), (288, 6, 14), (576, 4, 7)):
        tokens = grid**2 + 1
        expected += depth * (tokens * width * width * 12 + 2 * tokens * tokens * width)
        expected += grid**2 * width * 9 + before * width if before else 0
        before = width
    assert cost(model, torch.zeros(1, 3, 224, 224)).macs == expected
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("cait_xxs24_224", 224),
        ("coat_lite_mini", 224),
        ("convit_tiny", 224),
        ("deit_tiny_distilled_patch16_224", 224),
        ("efficientnet_b0", 64),
        ("naflexvit_base_patch16_siglip", 384),
        ("pit_ti_distilled_224", 224),
        ("swin_tiny_patch4_window7_224", 224),
        ("xcit_nano_12_p16_224", 224),
    ],
)
def test_any_network_can_be_counted_and_is_left_as_it_was(name, size) -> None:
    """As many multiply-adds as PyTorch's counter finds where no parameter needs a gradient and nothing is fused."""
    with torch.device("meta"):
        model, plain, image = (
            timm.create_model(name).eval(),
            timm.create_model(name).eval(),
            torch.zeros(1, 3, size, size),
        )
    modules: list[Any] = attention_modules(plain.requires_grad_(False))
    for module in modules:
        module.fused_attn = False
    with FlopCounterMode(display=False) as counter:
        plain(image)
    frozen = list(model.parameters())[-1].requires_grad_(False)
    before = [(module, module.fused_attn) for module in attention_modules(model)]
    found = cost(model, image)
    assert 2 * found.macs == counter.get_total_flops() > 0
    assert [(module, module.fused_attn) for module in attention_modules(model)] == before
    assert [parameter for parameter in model.parameters() if not parameter.requires_grad] == [frozen]


def test_links_are_those_of_the_run_on_the_grid_of_the_run(tmp_path) -> None:
    file, student = tmp_path / "losses.safetensors", timm.create_model("deit_tiny_patch16_224").eval()
    assert links_of(file, student) == {}
    tensors = {
        "a.aal.links.weight": torch.zeros(952, 72, 1),
        "a.aal.links.bias": torch.zeros(952),
        "b.other.weight": torch.zeros(3, 3),
    }
    for note, positions in (
        (None, 196),
        ({"a": '{"grid": 7}'}, 49),
        ({"a": "["}, 196),
        ({"a": '{"grid": 1e9}'}, 196),
        ({"b": "{}"}, 196),
    ):
        save_file(tensors, file, note)
        ((links, maps),) = links_of(file, student).values()
        found = cost(links, maps)
        assert (found.parameters, found.macs) == (69_496, 952 * 72 * positions)
    file.write_bytes(b"no weights")
    with pytest.raises(UserError, match="cannot be read as weights"):
        links_of(file, student)


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cost") / "run"
    run(world, out, "aal", f"losses.aal.target={world.targets['activations u8']}")
    return out


def test_the_command(trained, capsys) -> None:
    words = ["evaluate", "cost", str(trained), str(trained), "--teacher", "resnet10t", "--batch-size", "2"]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--json"])
    said = capsys.readouterr()
    assert ended.value.code == 0, said.err
    result = json.loads(said.out)
    kinds = [one["kind"] for one in result["costs"]]
    assert kinds == ["student", "links", "student", "links", "teacher"]
    student, links, again, _, teacher = result["costs"]
    assert links["parameters"] == 60 * 6 + 60
    assert links["macs"] == 60 * 6 * 64
    assert student["flops"] == 2 * student["macs"] == again["flops"]
    assert teacher["parameters"] == sum(p.numel() for p in timm.create_model("resnet10t").parameters())
    assert all(one["seconds"]["low"] <= one["seconds"]["median"] <= one["seconds"]["high"] for one in result["costs"])
    with pytest.raises(SystemExit):
        main(words)
    assert "multiply-adds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["cost", "--teacher", "resnet10"], 1, "no teacher is called 'resnet10'\n  Did you mean"),
        (["cost", "--shards", "x.tar"], 2, "No such option '--shards'"),
        (["accuracy", "--teacher", "resnet10t", "--shards", "x.tar"], 2, "is a student, --teacher resnet10t a teacher"),
        (["accuracy", "--no-project"], 2, "Missing option '--shards'"),
    ],
)
def test_mistakes_are_told(trained, capsys, words, status, message) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", words[0], str(trained), *words[1:]])
    assert ended.value.code == status
    assert message in capsys.readouterr().err
