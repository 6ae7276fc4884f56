"""Networks of timm that are unlike others: one that PyTorch cannot export, one without the usual patch embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import timm
import torch

from pipeline.cli import main
from precompute.capabilities import bare, offers_of
from precompute.export.pytorch import export_student
from precompute.taps import Tap, TappedTeacher
from storage.errors import UserError
from storage.testing import synthetic_shards

if TYPE_CHECKING:
    from pathlib import Path

HIERA = {"embed_dim": 16, "stages": [1, 1, 1, 1], "num_classes": 3, "img_size": 64}
HALF = (0.5, 0.5, 0.5)


def test_a_network_that_pytorch_cannot_export_is_refused_in_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(timm.create_model("hiera_tiny_224", **HIERA).state_dict(), "w.pth")
    synthetic_shards(tmp_path, shards=1, samples=4, stem="train")
    words = [
        "precompute",
        "--teacher",
        "hiera_tiny_224",
        "--weights",
        "w.pth",
        "--shards",
        "train-000000.tar",
        "--store",
        "S",
        "--view-policy",
        "eval",
        "--view-size",
        "64",
        "--target",
        "logits",
        *(w for k, v in HIERA.items() for w in ("--teacher-arg", f"{k}={v}")),
    ]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 1
    said = capsys.readouterr()
    (before, message) = said.err.split("error: ")
    assert len(before.splitlines()) == 2, "what is done, and nothing of the exporter"
    assert "hiera_tiny_224: PyTorch cannot export it as an ONNX graph: AssertionError: only 4D query" in message
    assert "--teacher model.onnx --tap-tensor TAP=TENSOR" in message
    assert "\n  --debug shows" in message
    assert len(message.splitlines()) == 3
    assert said.out == ""
    with pytest.raises(UserError) as raised:
        main([*words, "--debug"])
    assert isinstance(raised.value.__cause__, torch.onnx.errors.OnnxExporterError), "all of it, with --debug"


def test_a_student_that_pytorch_cannot_export_is_refused_too() -> None:
    model = timm.create_model("hiera_tiny_224", **HIERA).eval()
    with pytest.raises(UserError, match=r"^mine: PyTorch cannot export it as an ONNX graph: .*4D query[^\n]*$"):
        export_student(model, 64, mean=HALF, std=HALF, images=np.zeros((2, 64, 64, 3), np.uint8), name="mine")


@pytest.mark.parametrize("name", ["naflexvit_base_patch16_gap", "vit_tiny_patch16_224", "pit_ti_224"])
def test_what_a_network_offers_is_what_it_gives(name: str) -> None:
    size = 64 if "flex" in name else 224
    offered, (_, _, network) = offers_of(name, size), bare(name, size, "cpu")
    image = torch.zeros(1, size, size, 3, dtype=torch.uint8)
    for tap, offer in offered.taps.items():
        module = TappedTeacher(network, [Tap(tap)], size, input_size=size, mean=HALF, std=HALF).eval()
        with torch.no_grad():
            assert module(image)[0].shape[1:] == offer.shape, tap
