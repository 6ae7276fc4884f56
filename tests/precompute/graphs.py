"""Graphs that tests take as teachers: timm networks exported as users would, and small ones of a few nodes."""

from __future__ import annotations

import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from precompute.export.onnx_file import export_ready
from precompute.taps import Tap, cnn_stages
from precompute.teachers import teacher as teachers
from tests.precompute.networks import attention_modules
from tests.typed import present

if TYPE_CHECKING:
    from collections.abc import Sequence

HALF: dict[str, Any] = {"mean": (0.5,), "std": (0.5,)}
FREE: Sequence[int | str] = ("N", 3, 16, 16)


class _Named(nn.Module):
    """A network with what a user may want of it as outputs."""

    def __init__(self, model: Any, kind: str) -> None:
        super().__init__()
        self.model = model
        self.kept: dict[int, Tensor] = {}
        for n, (_, norm) in enumerate(cnn_stages(model) if kind == "cnn" else ()):
            norm.register_forward_hook(lambda m, args, output, n=n: self.kept.__setitem__(n, output.clone()))
        for layer in attention_modules(model):
            layer.fused_attn = False

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        features = self.model.forward_features(image)
        logits = self.model.forward_head(features)
        return (*(self.kept[n] for n in sorted(self.kept)), logits) if self.kept else (features, features[:, 0], logits)


OUTPUTS = {"cnn": ["stage1", "stage2", "stage3", "stage4", "logits"], "vit": ["tokens", "cls", "logits"]}


_files: dict[tuple[str, str], bytes] = {}  # made once in a process


def exported(teacher: Any, kind: str, path: Path) -> Path:
    """A timm teacher's network as a file, with `OUTPUTS`; its input is `image`."""
    key = (teacher.id, kind)
    if key not in _files:
        _export(teacher, kind, path)
        _files[key] = path.read_bytes()
    path.write_bytes(_files[key])
    return path


def _export(teacher: Any, kind: str, path: Path) -> None:
    module = _Named(teachers.load_teacher(teacher), kind).eval()
    free = {"image": {0: torch.export.Dim("n", min=1, max=999)}}
    image = torch.zeros(2, 3, teacher.input_size, teacher.input_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            (image,),
            dynamo=True,
            verbose=False,
            input_names=["image"],
            output_names=OUTPUTS[kind],
            dynamic_shapes=free,
        )
    present(program).save(str(path))


def made_by(path: Path, operator: str) -> list[str]:
    """Names of the tensors that a file's nodes of one kind give, in order."""
    return [node.output[0] for node in onnx.load(str(path)).graph.node if node.op_type == operator]


def small(
    path: Path,
    nodes: Sequence[Any] | None = None,
    *,
    shape: Sequence[int | str] = FREE,
    kind: int = TensorProto.FLOAT,
    inputs: Sequence[str] = ("x",),
    outputs: Sequence[str] = ("y",),
    weights: dict[str, np.ndarray] | None = None,
    opset: int = 17,
    domains: Sequence[str] = (),
) -> Path:
    """A file of a few nodes; by default from `x` to `y`, the means of its channels `[N, 3]`."""
    nodes = nodes or [node("GlobalAveragePool", inputs[0], "pooled"), node("Flatten", "pooled", outputs[0])]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, kind, shape) for name in inputs],
        [helper.make_tensor_value_info(name, kind, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()],
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    path.write_bytes(helper.make_model(graph, opset_imports=imports, ir_version=8).SerializeToString())
    return path


def node(operator: str, given: str, gives: str, **attributes: Any) -> Any:
    """A node; several names with spaces between."""
    return helper.make_node(operator, given.split(), gives.split(), **attributes)


MEANS = [node("GlobalAveragePool", "x", "pooled"), node("Flatten", "pooled", "y")]


def means(images: np.ndarray) -> np.ndarray:
    """What `small` says of view images as large as its input, with mean and std one half."""
    return np.asarray(images.astype(np.float64).mean((1, 2)) / 127.5 - 1)


def said(path: Path, tap: Tap | None = None, **changes: Any) -> tuple[np.ndarray, np.ndarray]:
    """Five view images of 16x16, and what a file's graph says of them."""
    images = np.random.default_rng(1).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    teacher = teachers.find_teacher(str(path), **{**HALF, **changes})
    taps = [tap or Tap("logits", tensors=("y",))]
    with TemporaryDirectory() as folder:
        (values,) = export_ready(teacher, taps, 16, images, file=Path(folder) / "g.onnx").values
    return images, values
