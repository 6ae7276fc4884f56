"""Networks of timm that are unlike others: one that PyTorch cannot export, one without the usual patch embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import timm
import torch
from timm.models import register_model
from timm.models.resnet import BasicBlock, ResNet

from pipeline.cli import main
from precompute.capabilities import bare, offers_of
from precompute.export.pytorch import export_student
from precompute.record_targets import usual_at
from precompute.taps import Tap, TappedTeacher
from precompute.teachers.teacher import anatomy
from storage.errors import UserError
from storage.testing import synthetic_shards

if TYPE_CHECKING:
    from pathlib import Path

HIERA = {"embed_dim": 16, "stages": [1, 1, 1, 1], "num_classes": 3, "img_size": 64}
HALF = (0.5, 0.5, 0.5)


class Undecided(ResNet):  # type: ignore[misc]  # timm has no types here
    """What it computes depends on what it sees, so there is no one graph of it."""

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = super().forward_features(x)
        return features if features.mean() > 0 else -features


@register_model  # type: ignore[untyped-decorator]
def undecided_net(pretrained: bool = False, num_classes: int = 1000, **_of_timm: Any) -> ResNet:
    return Undecided(BasicBlock, (1, 1, 1, 1), num_classes=num_classes)


def words_of(name: str, folder: Path, arguments: dict[str, Any], target: str) -> list[str]:
    """The command that stores a target of a network with random weights."""
    torch.save(timm.create_model(name, **arguments).state_dict(), "w.pth")
    synthetic_shards(folder, shards=1, samples=4, stem="train")
    words = ["precompute", "--teacher", name, "--weights", "w.pth", "--shards", "train-000000.tar", "--store", "S"]
    words += ["--view-policy", "eval", "--view-size", "64", "--input-size", "64", "--target", target]
    return [*words, *(w for k, v in arguments.items() for w in ("--teacher-arg", f"{k}={v}"))]


def test_a_network_that_pytorch_cannot_export_is_refused_in_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    words = words_of("undecided_net", tmp_path, {"num_classes": 3}, "logits")
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 1
    said = capsys.readouterr()
    (before, message) = said.err.split("error: ")
    assert len(before.splitlines()) == 2, "what is done, and nothing of the exporter"
    assert "undecided_net: PyTorch cannot export it as an ONNX graph: " in message
    assert "--teacher model.onnx --tap-tensor TAP=TENSOR" in message
    assert "\n  --debug shows" in message
    assert len(message.splitlines()) == 3
    assert said.out == ""
    with pytest.raises(UserError) as raised:
        main([*words, "--debug"])
    assert isinstance(raised.value.__cause__, torch.onnx.errors.OnnxExporterError), "all of it, with --debug"


def test_a_student_that_pytorch_cannot_export_is_refused_too(tmp_path: Path) -> None:
    model = timm.create_model("undecided_net", num_classes=3).eval()
    images = np.zeros((2, 64, 64, 3), np.uint8)
    with pytest.raises(UserError, match=r"^mine: PyTorch cannot export it as an ONNX graph: [^\n]*$"):
        export_student(model, 64, mean=HALF, std=HALF, images=images, name="mine", file=tmp_path / "g.onnx")


def test_a_kernel_of_five_axes_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Hiera's, which torch's exporter does not know; its graph is compared with PyTorch as any other."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(words_of("hiera_tiny_224", tmp_path, HIERA, "logits"))
    said = capsys.readouterr().err
    assert ended.value.code == 0, said
    assert "graph against PyTorch, logits: largest difference" in said


@pytest.mark.parametrize("name", ["naflexvit_base_patch16_gap", "vit_tiny_patch16_224", "pit_ti_224"])
def test_what_a_network_offers_is_what_it_gives(name: str) -> None:
    size = 64 if "flex" in name else 224
    offered, (_, _, network) = offers_of(name, size), bare(name, size, "cpu")
    image = torch.zeros(1, size, size, 3, dtype=torch.uint8)
    at = usual_at(anatomy(network, size))
    for tap, offer in offered.taps.items():
        grid = 14 if tap == "activations" else None
        module = TappedTeacher(network, [Tap(tap, grid=grid, at=at)], size, input_size=size, mean=HALF, std=HALF).eval()
        with torch.no_grad():
            assert module(image)[0].shape[1:] == offer.shape, tap
