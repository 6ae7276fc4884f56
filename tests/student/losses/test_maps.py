"""Maps of students without tokens: against a transcription in plain PyTorch, and zero where both sides are equal."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from precompute.taps import Tap, TappedTeacher
from storage.errors import UserError
from student.alignment.stages import student_stages
from student.alignment.student_spec import StudentSpec, student_spec
from student.alignment.student_taps import StudentTaps, embedding_width
from student.losses.feature_mse import FeatureMSEConfig, FeatureMSELoss
from student.models.build import build_student
from student.settings import StudentConfig
from tests.manifests import stored
from tests.typed import grad, present

if TYPE_CHECKING:
    from student.targets.stored_target import StoredTarget

SIZE = 64
SWIN: dict[str, Any] = {"img_size": SIZE, "embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}
VIT = {"layers": 3, "prefix": ["class"]}


def network(name: str = "test_resnet", **arguments: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=3, **arguments).eval()


def spec_of(model: nn.Module) -> StudentSpec:
    return student_spec(model, attention=False, maps=True, size=SIZE)


def loss_of(model: nn.Module, target: StoredTarget, **settings: Any) -> Any:
    return FeatureMSELoss("it", FeatureMSEConfig(**settings), spec_of(model), [target])


def compared(model: Any, loss: Any, pixels: torch.Tensor, target: torch.Tensor) -> Any:
    with StudentTaps(model, {"streams"}, None, spec_of(model).stages) as taps:
        model(pixels)
    value = loss(SimpleNamespace(student_taps=taps, targets=(target,)))
    taps.remove()
    return value


@pytest.mark.parametrize(
    ("name", "arguments", "stage"),
    [
        ("test_resnet", {}, 4),
        ("test_efficientnet", {}, 5),
        ("test_convnext", {}, 4),
        ("swin_tiny_patch4_window7_224", SWIN, 1),  # channels last
    ],
)
def test_patch_tokens_meet_a_map_through_one_convolution(name: str, arguments: Any, stage: int) -> None:
    model, pixels, target = network(name, **arguments), torch.randn(2, 3, SIZE, SIZE), torch.randn(2, 2, 50, 20)
    given = stored("tokens", [2, 50, 20], [2, 3], VIT)
    loss = loss_of(model, given, layers=((stage, 2),), projection="linear", grid="bicubic")
    found = compared(model, loss, pixels, target)
    # in plain PyTorch
    own = model.forward_intermediates(pixels, output_fmt="NCHW", intermediates_only=True)[stage - 1]
    linear = present(loss.projections)[0]
    projected = F.conv2d(own, linear.weight[:, :, None, None], linear.bias)
    patches = target[:, 0, 1:].transpose(1, 2).reshape(2, 20, 7, 7)
    patches = F.interpolate(patches, own.shape[-2:], mode="bicubic", align_corners=False)
    assert torch.isclose(found, F.mse_loss(projected, patches), rtol=1e-5)
    found.backward()
    assert grad(linear.weight).abs().max() > 0
    assert next(p.grad for p in model.parameters() if p.grad is not None).abs().max() > 0


def teacher_maps(model: Any, pixels: torch.Tensor, *stages: int, grid: int) -> tuple[StoredTarget, torch.Tensor]:
    tap = Tap("activations", layers=stages, grid=grid, at="stage")
    teacher = TappedTeacher(model, [tap], SIZE, input_size=SIZE, mean=(0.5,) * 3, std=(0.5,) * 3).eval()
    with torch.no_grad():
        (target,) = teacher(pixels)
    kept = [{"stage": n, "tap": tap, "channels": channels} for n, tap, channels, _ in teacher.stages(tap)]
    about = {"network": "cnn", "layers": 4, "stages": 5}
    identity = {"teacher": "t", "bank": "b", "tap": "activations", "layers": stages, "grid": grid, "codec": "f32"}
    given = stored("activations", target.shape[1:], stages, about, grid, stages=kept, axes=["channel", "y", "x"])
    content = given.target.model_dump() | {"identity": {**identity, "at": "stage"}}
    target_manifest = type(given.target).model_validate(content)
    return type(given)(target=target_manifest, teacher=given.teacher), target


def test_a_cnn_that_is_its_teacher_has_no_loss() -> None:
    model, images = network(), torch.randint(0, 256, (2, SIZE, SIZE, 3), dtype=torch.uint8)
    given, target = teacher_maps(network(), images, 3, 4, grid=4)
    pixels = (images.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    plain = loss_of(model, given, layers=((4, 4),))
    identity = loss_of(model, given, layers=((4, 4),), projection="linear")
    (linear,) = present(identity.projections)
    nn.init.eye_(linear.weight)
    nn.init.zeros_(linear.bias)
    for loss in (plain, identity):
        assert compared(model, loss, pixels, target) < 1e-10
    other = network()
    nn.init.normal_(other.layer4[0].conv1.weight)
    assert compared(other, plain, pixels, target) < 1e-10, "stage 4 is layer3, after the stem"
    nn.init.normal_(other.conv1[0].weight)
    assert compared(other, plain, pixels, target) > 1e-4
    assert "stage 4 (192 maps of 4x4) - 4" in present(plain.row).rule


def test_pairs_of_stages_are_summed() -> None:
    model, pixels, target = network(), torch.randn(2, 3, SIZE, SIZE), torch.randn(2, 2, 17, 20)
    given = stored("tokens", [2, 17, 20], [2, 3], VIT)
    both = loss_of(model, given, layers=((4, 2), (5, 3)), projection="linear", grid="bicubic")
    parts = []
    for n, pair in enumerate(((4, 2), (5, 3))):
        one = loss_of(model, given, layers=(pair,), projection="linear", grid="bicubic")
        present(one.projections)[0].load_state_dict(present(both.projections)[n].state_dict())
        parts.append(compared(model, one, pixels, target))
    assert torch.isclose(compared(model, both, pixels, target), sum(parts), rtol=1e-5)


def test_tokens_after_the_final_norm_serve_a_map() -> None:
    given = stored("tokens", [1, 17, 20], None, VIT)
    row = present(loss_of(network(), given, projection="linear", grid="bicubic").row)
    assert "stage 5 (96 maps of 2x2) - 3" in row.rule
    assert "resized from 4x4 (bicubic)" in row.rule
    assert "left out: teacher's class" in row.rule


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"projection": "linear"}, r"grid of 4x4, the student's patches make 2x2\n.*losses\.it\.grid=bicubic"),
        ({"grid": "bicubic"}, r"is 20 in the teacher, 96 in layer 5 of the student\n.*losses\.it\.projection=linear"),
        ({"layers": ((6, 3),)}, r"the student has layers 1 to 5"),
        ({"layers": None}, r"the teacher has 3 layers, the student 5"),
    ],
)
def test_what_cannot_meet_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        loss_of(network(), stored("tokens", [2, 17, 20], [2, 3], VIT), **settings)


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_efficientnet", "test_convnext", "mobilenetv3_small_050", "pit_ti_224"]
)
@pytest.mark.parametrize("classes", [0, 3])
def test_the_embedding_is_what_the_classifier_reads(name: str, classes: int) -> None:
    """With a classifier and without one, whatever the features of a network are called."""
    size = 224 if name == "pit_ti_224" else 32
    torch.manual_seed(0)
    model, pixels = timm.create_model(name, num_classes=classes).eval(), torch.randn(2, 3, size, size)
    taps = StudentTaps(model, {"embedding"})
    with torch.no_grad(), taps:
        model(pixels)
        expected = model.forward_head(model.forward_features(pixels), pre_logits=True)
    assert torch.equal(taps.embedding, expected)
    taps.remove()
    assert embedding_width(model, size) == expected.shape[1]


def test_a_network_that_names_no_classifier_is_refused() -> None:
    class Own(nn.Module):
        num_classes = 3

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3))

    with pytest.raises(UserError, match="student Own: it does not say what its classifier is"):
        StudentTaps(Own(), {"embedding"})
    Own.num_classes = 0
    own = Own()
    own.scale = nn.Parameter(torch.ones(1))
    assert embedding_width(own, 8) == 3, "without a classifier its output is its embedding"


class SharedActivation(nn.Module):
    """Two stages that end in one and the same module."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.act = nn.Conv2d(3, 4, 8, 8), nn.Conv2d(4, 4, 1), nn.ReLU()
        self.num_features = 4

    def forward_intermediates(self, x: torch.Tensor, **_: Any) -> list[torch.Tensor]:
        one = self.act(self.one(x))
        return [one, self.act(self.two(one))]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_intermediates(x)[-1].mean((2, 3))


def test_a_module_that_runs_twice_is_no_stage() -> None:
    torch.manual_seed(0)
    assert [stage.module for stage in student_stages(SharedActivation(), SIZE)] == [None, None]


@pytest.mark.parametrize("name", ["resnetv2_50", "densenet121", "resnet18"])
def test_a_stage_s_module_gives_its_map(name: str) -> None:
    """Also where what follows changes the last module's output in place."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0).eval()
    pixels = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        maps = model.forward_intermediates(pixels, output_fmt="NCHW", intermediates_only=True)
    compared = 0
    for stage, expected in zip(student_stages(model, SIZE), maps, strict=True):
        if stage.module is None:
            continue
        outputs: list[torch.Tensor] = []
        handle = stage.module.register_forward_hook(lambda _module, _args, output, kept=outputs: kept.append(output))
        with torch.no_grad():
            model(pixels)
        handle.remove()
        assert torch.allclose(stage.vectors(outputs[0]), expected.flatten(2).mT, rtol=1e-4, atol=1e-5)
        compared += 1
    assert compared >= 3


@pytest.mark.parametrize(("name", "width"), [("mobilenet_v3_small", 1024), ("resnet18", 512)])
def test_a_network_of_torchvision_without_a_classifier_gives_its_embedding(name: str, width: int) -> None:
    settings = StudentConfig(model=f"torchvision/{name}", img_size=SIZE)
    model, _ = build_student(settings, 0)
    assert model.num_classes == 0
    assert embedding_width(model, SIZE) == width
    assert model.eval()(torch.zeros(1, 3, SIZE, SIZE)).shape == (1, width)


def test_torchvision_s_networks_without_a_linear_layer_are_refused() -> None:
    with pytest.raises(UserError, match="it does not end in a linear layer, so its classifier cannot be removed"):
        build_student(StudentConfig(model="torchvision/squeezenet1_1", img_size=SIZE), 0)
