"""Ready graphs whose tensors are not what they are named for: probabilities are no logits, and no other tap."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from precompute import capabilities
from precompute.taps import Tap
from precompute.teachers import onnx_file
from storage.errors import UserError
from tests.precompute.graphs import MEANS, node, said, small

FC = [*MEANS[:1], node("Flatten", "pooled", "f"), node("MatMul", "f w", "fc")]
WEIGHTS = {"w": np.random.default_rng(0).normal(0, 20, (3, 4)).astype(np.float32)}
ENDS = {
    "softmax": [node("Softmax", "fc", "y", axis=-1)],
    "then other operators": [
        node("Softmax", "fc", "s", axis=-1),
        node("Identity", "s", "i"),
        node("Cast", "i", "c", to=1),
        node("Flatten", "c", "y"),
    ],
    "sigmoid": [node("Sigmoid", "fc", "y")],
}


def classifier(path: Path, end: str) -> Path:
    return small(path, [*FC, *ENDS[end]], weights=WEIGHTS)


@pytest.mark.parametrize("end", ENDS)
def test_probabilities_are_no_logits_and_the_tensor_before_them_is_named(tmp_path: Path, end: str) -> None:
    path = classifier(tmp_path / "g.onnx", end)
    with pytest.raises(UserError, match=r"g\.onnx: logits=y: these are probabilities.*\n.*`tap_tensor=logits=fc`$"):
        said(path)
    images, values = said(path, Tap("logits", tensors=("fc",)))
    expected = (images.astype(np.float64).mean((1, 2)) / 127.5 - 1) @ WEIGHTS["w"]
    assert np.abs(values - expected).max() < 1e-3


def test_a_classifier_that_pytorch_exports_with_its_softmax_is_refused(tmp_path: Path) -> None:
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4), nn.Softmax(-1)).eval()
    path = tmp_path / "g.onnx"
    torch.onnx.export(
        network,
        (torch.zeros(2, 3, 16, 16),),
        path,
        dynamo=True,
        verbose=False,
        input_names=["x"],
        output_names=["y"],
        dynamic_shapes=({0: torch.export.Dim("n", min=1, max=99)},),
    )
    (gemm,) = [n.output[0] for n in onnx.load(str(path)).graph.node if n.op_type == "Gemm"]
    with pytest.raises(UserError, match=rf"`tap_tensor=logits={gemm}`$"):
        said(path)
    with pytest.raises(UserError, match=rf"its outputs: y\n.* such as `tap_tensor=logits={gemm}`"):
        onnx_file.given_tensors(str(path), {}, [])
    offered = capabilities.onnx_offers_of(str(path)).tensors["logits"]
    assert gemm in offered
    assert "y" not in offered


def test_probabilities_without_an_operator_that_says_so_are_refused_by_their_values(tmp_path: Path) -> None:
    nodes = [*FC, node("Exp", "fc", "e"), node("ReduceSum", "e axis", "sum"), node("Div", "e sum", "y")]
    weights: dict[str, Any] = {"w": WEIGHTS["w"] / 20, "axis": np.array([1])}
    path = small(tmp_path / "g.onnx", nodes, weights=weights)
    with pytest.raises(UserError, match=r"each row sums to one\n  Name the tensor before the softmax.$"):
        said(path)


def test_log_probabilities_are_logits(tmp_path: Path) -> None:
    path = small(tmp_path / "g.onnx", [*FC, node("LogSoftmax", "fc", "y", axis=-1)], weights=WEIGHTS)
    logs, plain = (torch.from_numpy(said(path, Tap("logits", tensors=(name,)))[1]) for name in ("y", "fc"))
    assert torch.allclose(logs.softmax(-1), plain.softmax(-1), atol=1e-5)


@pytest.mark.parametrize(
    ("tap", "shape"),
    [("embedding", (-1, 768)), ("class_token", (-1, 768)), ("tokens", (-1, 16, 48)), ("activations", (-1, 12, 8, 8))],
)
def test_rows_that_sum_to_one_are_no_other_tap_either(tmp_path: Path, tap: str, shape: tuple[int, ...]) -> None:
    nodes = [node("Reshape", "x shape", "r"), node("Softmax", "r", "y", axis=-1)]
    path = small(tmp_path / "g.onnx", nodes, weights={"shape": np.array(shape)})
    grid = 4 if tap == "activations" else None
    with pytest.raises(UserError, match=rf"{tap}=y: these are probabilities: .*\n  Name another tensor"):
        said(path, Tap(tap, layers=None, grid=grid, tensors=("y",)))
    _, values = said(path, Tap(tap, layers=None, grid=grid, tensors=("r",)))
    assert values.std() > 0.1


# ---------------------------------------------------------------------------------------------- ways out


def test_a_dynamically_quantized_file_is_said_to_be_and_a_statically_quantized_one_is_taken(tmp_path: Path) -> None:
    quantization = pytest.importorskip("onnxruntime.quantization")
    weights = {"w": np.random.default_rng(0).normal(0, 1, (3, 64)).astype(np.float32)}
    plain = small(tmp_path / "plain.onnx", [*FC[:2], node("MatMul", "f w", "y")], weights=weights)
    quantization.quantize_dynamic(plain, tmp_path / "dynamic.onnx")
    with pytest.raises(UserError, match=r"differs from that of each .*\n  It is dynamically quantized") as raised:
        said(tmp_path / "dynamic.onnx")
    assert "free batch" not in str(raised.value), "it is free"

    class Images(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        left = iter([{"x": np.random.default_rng(n).uniform(-1, 1, (1, 3, 16, 16)).astype(np.float32)} for n in (1, 2)])

        def get_next(self) -> Any:
            return next(self.left, None)

    quantization.quantize_static(plain, tmp_path / "static.onnx", Images())
    assert said(tmp_path / "static.onnx")[1].shape == (5, 64)


def test_a_graph_that_mixes_images_of_a_free_batch_is_not_told_to_free_it(tmp_path: Path) -> None:
    nodes = [
        *MEANS[:1],
        node("Flatten", "pooled", "f"),
        node("ReduceMean", "f", "m", axes=[0]),
        node("Sub", "f m", "y"),
    ]
    with pytest.raises(UserError, match=r"\n  Export it again in evaluation mode: its batch is free, but it mixes"):
        said(small(tmp_path / "g.onnx", nodes))


def test_a_file_with_tensors_in_another_is_merged_by_the_command_that_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = small(Path("plain.onnx"), [*FC[:2], node("MatMul", "f w", "y")], weights=WEIGHTS)
    onnx.save(onnx.load(str(plain)), "model.onnx", save_as_external_data=True, location="data.bin", size_threshold=0)
    with pytest.raises(UserError, match=r"1 tensor\(s\) in other files \(w\)\n  Save it as one file:\n") as raised:
        said(Path("model.onnx"))
    command = shlex.split(str(raised.value).rpartition("\n")[2])
    assert command.pop(0) == "python"
    subprocess.run([sys.executable, *command], check=True)
    assert np.array_equal(said(Path("whole.onnx"))[1], said(plain)[1])
