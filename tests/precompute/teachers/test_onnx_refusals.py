"""Ready graphs that cannot teach: whatever is in a file or said of it ends in one clear error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import FunctionProto, ModelProto, NodeProto, SparseTensorProto, TensorProto, helper, numpy_helper

from precompute.engine.session import open_session
from precompute.export import onnx_file as joined
from precompute.export.onnx_file import export_ready
from precompute.taps import Tap
from precompute.taps.target_spec import parse_target
from precompute.teachers import onnx_file
from precompute.teachers import teacher as teachers
from storage.errors import UserError
from tests.precompute.graphs import FREE, HALF, node, said, small

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

# ---------------------------------------------------------------------------------------------- files

FIXED = [
    node("GlobalAveragePool", "x", "p"),
    node("Reshape", "p shape", "y"),
]
MIXES = [
    node("GlobalAveragePool", "x", "p"),
    node("Flatten", "p", "f"),
    node("ReduceMean", "f", "m", axes=[0]),
    node("Sub", "f m", "y"),
]


@pytest.mark.parametrize(
    ("about", "says"),
    [
        (
            {"nodes": FIXED, "weights": {"shape": np.array([1, 3])}, "shape": (1, 3, 16, 16)},
            r"cannot be run on 2 x \[1, 3, 16, 16\].*its batch is fixed at 1\n  Export it again with a free batch",
        ),
        (
            {"nodes": FIXED, "weights": {"shape": np.array([1, -1])}, "shape": (1, 3, 16, 16)},
            r"y is \[1, 6\] for 2 images; expected one row each; its batch is fixed at 1",
        ),
        ({"nodes": MIXES}, r"y of two images together differs from that of each alone by .* \(allowed: 0.001\)"),
        ({"nodes": [node("Magic", "x", "y", domain="mine")], "domains": ["mine"]}, r"g.onnx: .*cannot be run: .*Magic"),
        (
            {"nodes": [node("Log", "x", "l"), node("GlobalAveragePool", "l", "p"), node("Flatten", "p", "y")]},
            "y: some of its values are not finite numbers",
        ),
        ({"nodes": [node("Shape", "x", "y")]}, "y is int64; expected floating-point numbers"),
        ({"nodes": [node("Relu", "x", "y")]}, r"logits=y: expected \[B, K\], found \[5, 3, 16, 16\]"),
    ],
    ids=["fixed reshape", "silent reshape", "mixes images", "unknown operator", "not finite", "integers", "rank"],
)
def test_graphs_that_cannot_teach_are_refused(tmp_path: Path, about: dict[str, Any], says: str) -> None:
    path = small(tmp_path / "g.onnx", **about)
    with pytest.raises(UserError, match=says) as caught:
        said(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("about", "says"),
    [
        ({"inputs": ("x", "z")}, r"it has 2 inputs \(x, z\); expected one"),
        ({"kind": TensorProto.UINT8}, "its input x is uint8; expected normalized images: float32"),
        ({"kind": TensorProto.STRING}, "its input x is string"),
        ({"shape": ("N", 3, 16)}, r"its input x is \[N, 3, 16\]; expected a batch of RGB images"),
        ({"shape": ("N", 5, 16, 16)}, r"its input x is \[N, 5, 16, 16\]; expected three channels"),
        ({"shape": ("N", 3, 16, 24)}, r"is \[N, 3, 16, 24\]; teachers take only square images"),
        ({"shape": ("N", 3, 4, 4)}, r"`input_size=4`: expected 8 to 4096"),
        ({"shape": ("N", 3, "H", "W")}, r"it takes images of any size\n  Give the size .*: `input_size=N`"),
    ],
)
def test_other_inputs_than_square_images_are_refused(tmp_path: Path, about: dict[str, Any], says: str) -> None:
    path = small(tmp_path / "g.onnx", **about)
    with pytest.raises(UserError, match=says):
        teachers.find_teacher(str(path), **HALF)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x08\x07" * 100, b"\x89PNG\r\n\x1a\n" * 9, None])
def test_files_that_are_no_graphs_are_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "g.onnx"
    whole = small(path).read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(UserError, match=r"g\.onnx: .*is not an ONNX file"):
        teachers.find_teacher(str(path), **HALF)


def test_files_that_cannot_be_read_or_are_too_large_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.onnx`: cannot be read: No such file"):
        teachers.find_teacher(str(tmp_path / "nowhere.onnx"), **HALF)
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(UserError, match=r"folder\.onnx`: cannot be read: Is a directory"):
        teachers.find_teacher(str(tmp_path / "folder.onnx"), **HALF)
    with pytest.raises(UserError, match="cannot be read: embedded null byte"):
        teachers.find_teacher("a\0b.onnx", **HALF)
    with (tmp_path / "huge.onnx").open("wb") as file:
        file.truncate(2**31)
    with pytest.raises(UserError, match=r"huge\.onnx: it has 2,147,483,648 bytes; one ONNX file holds at most"):
        teachers.find_teacher(str(tmp_path / "huge.onnx"), **HALF)


def outside(name: str, dims: Sequence[int], kind: int = TensorProto.FLOAT) -> TensorProto:
    """A tensor whose values lie in another file."""
    tensor = TensorProto(name=name, dims=dims, data_type=kind, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret.bin")
    return tensor


def sparse(part: str) -> SparseTensorProto:
    """A sparse tensor with one of its two parts in another file."""
    values = numpy_helper.from_array(np.ones(2, np.float32), "w")
    indices = numpy_helper.from_array(np.array([0, 3]), "i")
    found = SparseTensorProto(values=values, indices=indices, dims=[4])
    if part == "values":
        found.values.CopyFrom(outside("w", [2]))
    else:
        found.indices.CopyFrom(outside("i", [2], TensorProto.INT64))
    return found


def branch(tensor: TensorProto) -> NodeProto:
    """An `If` with a tensor in its branch."""
    graph = helper.make_graph(
        [node("Identity", tensor.name, "b")],
        "b",
        [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, [4])],
        [tensor],
    )
    found: NodeProto = node("If", "yes", "f", then_branch=graph, else_branch=graph)
    return found


def function(*nodes: NodeProto) -> FunctionProto:
    return helper.make_function("mine", "F", ["yes"], ["f"], nodes, [helper.make_opsetid("", 17)])


HIDDEN: dict[str, Callable[[ModelProto], Any]] = {
    "initializer": lambda m: m.graph.initializer.append(outside("w", [4])),
    "constant": lambda m: m.graph.node.append(node("Constant", "", "w", value=outside("w", [4]))),
    "sparse values": lambda m: m.graph.sparse_initializer.append(sparse("values")),
    "sparse indices": lambda m: m.graph.sparse_initializer.append(sparse("indices")),
    "sparse constant": lambda m: m.graph.node.append(node("Constant", "", "w", sparse_value=sparse("values"))),
    "sparse constant indices": lambda m: m.graph.node.append(node("Constant", "", "w", sparse_value=sparse("indices"))),
    "branch": lambda m: m.graph.node.append(branch(outside("w", [4]))),
    "function": lambda m: m.functions.append(function(node("Constant", "", "f", value=outside("w", [4])))),
    "branch of a function": lambda m: m.functions.append(function(branch(outside("w", [4])))),
}


@pytest.mark.parametrize("place", HIDDEN)
def test_a_graph_that_reads_other_files_is_refused(tmp_path: Path, place: str) -> None:
    path = small(tmp_path / "g.onnx")
    model = onnx.load(str(path))
    HIDDEN[place](model)
    path.write_bytes(model.SerializeToString())
    says = r"g\.onnx: .*keeps [12] tensor\(s\) in other files \([wi]\)\n  Save it as one file"
    with pytest.raises(UserError, match=says):
        teachers.find_teacher(str(path), **HALF)
    with pytest.raises(UserError, match="Save it as one file"):
        open_session(path.read_bytes(), "cpu")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mean": None}, r"does not say how its images are normalized\n  Give `mean=M` and `std=S`"),
        ({"std": None}, r"does not say how its images are normalized\n  Give `mean=M` and `std=S`"),
        ({"input_size": 32}, r"`input_size=32`: .* takes only images of 16x16"),
        ({"weights": "w.pth"}, r"`weights=w.pth`: .*g\.onnx is a ready graph, which holds its own"),
        ({"arguments": {"a": 1}}, r"`teacher_arg=a`: .* is a ready graph"),
        ({"teacher_name": "a/b"}, "`teacher_name=a/b`: a teacher's name has"),
    ],
)
def test_what_makes_no_sense_of_a_graph_is_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    path = small(tmp_path / "g.onnx", shape=FREE)
    with pytest.raises(UserError, match=says):
        teachers.find_teacher(str(path), **{**HALF, **changes})
    assert teachers.find_teacher(str(path), **HALF).name == "g"


# ---------------------------------------------------------------------------------------------- taps


@pytest.mark.parametrize(
    ("taps", "targets", "says"),
    [
        (
            [],
            [],
            r"its outputs: stage1, stage2.*\n.* by `tap_tensor=TAP=TENSOR`, such as `tap_tensor=logits=stage1`",
        ),
        (["logits"], [], "`tap_tensor=logits`: expected TAP=TENSOR"),
        (["logits="], [], "expected TAP=TENSOR"),
        (["logit=logits"], [], r"no tap is called 'logit'\n  Did you mean 'logits'"),
        (["logits=logit"], [], r"cnn-graph.onnx: no tensor is called 'logit'\n  Did you mean 'logits'"),
        (["logits=image"], [], "no tensor is called 'image'\n"),
        (["q=logits"], [], "q: a ready graph gives no q, k and v: .*\n.*`tap_tensor=attention=TENSOR`"),
        (["logits=logits", "logits=stage1"], [], "logits is one tensor, 2 are named: logits, stage1"),
        (["activations=stage1", "activations=stage1"], [], "activations: a tensor is named twice"),
        (["logits=logits"], ["activations"], "activations has no tensor"),
    ],
)
def test_taps_that_are_not_there_are_refused(tmp_path: Path, taps: list[str], targets: list[str], says: str) -> None:
    nodes = [node("Relu", "image", "stage1"), node("Neg", "image", "stage2"), node("Flatten", "image", "logits")]
    path = small(tmp_path / "cnn-graph.onnx", nodes, inputs=["image"], outputs=["stage1", "stage2", "logits"])
    with pytest.raises(UserError, match=says):
        onnx_file.given_tensors(
            str(path), onnx_file.named_outputs(taps), [w for text in targets for w in parse_target(text)]
        )


def shaped(path: Path, *shape: int, softmax: bool = False) -> Path:
    """A file whose `y` has this shape for each image, of pixels or of rows that sum to one."""
    nodes = [node("Reshape", "x shape", "r"), node("Softmax", "r", "y", axis=-1) if softmax else node("Relu", "r", "y")]
    return small(path, nodes, weights={"shape": np.array([-1, *shape])})


@pytest.mark.parametrize(
    ("tap", "shape", "softmax", "says"),
    [
        (
            "attention",
            (3, 16, 16),
            False,
            r"its rows are no attention: their sums differ from one by up to",
        ),
        ("attention", (12, 8, 8), True, r"8 tokens are no square of patches, nor one behind"),
        ("attention", (3, 8, 32), True, r"expected \[B, H, N, N\], found \[5, 3, 8, 32\]"),
        ("class_row", (48, 16), False, "its rows are no attention"),
        ("class_row", (48, 16), True, "16 tokens are a square of patches without a class token"),
        ("tokens", (8, 96), False, "8 tokens are no square of patches"),
        ("activations", (48, 4, 4, 1), False, r"expected \[B, C, h, h\]"),
        ("activations", (96, 4, 2), False, r"expected \[B, C, h, h\], found \[5, 96, 4, 2\]"),
        ("embedding", (3, 256), False, r"expected \[B, D\]"),
    ],
)
def test_contract_12_tensors_that_are_not_their_taps_are_refused(
    tmp_path: Path, tap: str, shape: tuple[int, ...], softmax: bool, says: str
) -> None:
    path = shaped(tmp_path / "g.onnx", *shape, softmax=softmax)
    with pytest.raises(UserError, match=says):
        said(path, Tap(tap, layers=None, grid=4 if tap == "activations" else None, tensors=("y",)))


def test_layers_of_one_tap_are_alike(tmp_path: Path) -> None:
    nodes = [node("Reshape", "x a", "y"), node("Reshape", "x b", "z")]
    path = small(tmp_path / "g.onnx", nodes, weights={"a": np.array([-1, 16, 48]), "b": np.array([-1, 4, 192])})
    with pytest.raises(UserError, match=r"tokens: its layers differ: \[5, 16, 48\], \[5, 4, 192\]"):
        said(path, Tap("tokens", layers=None, grid=None, tensors=("y", "z")))


def test_class_rows_and_what_a_network_is_read_off_their_shapes(tmp_path: Path) -> None:
    path = shaped(tmp_path / "g.onnx", 48, 16, softmax=True)
    nodes = onnx.load(str(path)).graph.node
    cut = np.array([5]), np.array([2])  # 16 values -> the first 5: one class token, 2x2 patches
    small(
        path,
        [nodes[0], node("Slice", "r zero five two", "s"), node("Softmax", "s", "y", axis=-1)],
        weights={"shape": np.array([-1, 48, 16]), "zero": np.array([0]), "five": cut[0], "two": cut[1]},
    )
    teacher = teachers.find_teacher(str(path), **HALF)
    images = np.random.default_rng(1).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    taps = [Tap("class_row", layers=(1,), grid=None, tensors=("y",))]
    exported = export_ready(teacher, taps, 16, images, file=tmp_path / "joined.onnx")
    assert exported.shapes == ((1, 48, 5),)
    assert exported.details[0]["network"].plain() == {"layers": 1, "prefix": ["class"], "heads": 48}


@pytest.mark.parametrize(
    ("tokens", "prefix"),
    [
        (196, []),
        (197, ["class"]),
        (198, ["class", "distillation"]),
        (199, None),
        (1, []),
        (2, ["class"]),
        (3, ["class", "distillation"]),
        (0, None),
    ],
)
def test_prefix_tokens_are_what_stands_beside_a_square(tokens: int, prefix: list[str] | None) -> None:
    assert onnx_file.prefix_of(tokens) == prefix


def test_a_graph_that_joining_changed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = small(
        tmp_path / "other.onnx",
        shape=("N", 16, 16, 3),
        kind=TensorProto.UINT8,
        inputs=("images",),
        nodes=[
            node("Cast", "images", "c", to=TensorProto.FLOAT),
            node("ReduceMean", "c", "y", axes=[1, 2], keepdims=0),
        ],
    )
    model = onnx.load(str(other))
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    monkeypatch.setattr(joined, "_joined", lambda alone, views: model.SerializeToString())
    with pytest.raises(UserError, match=r"logits: .* differs from the file run by itself by [0-9.e+-]+"):
        said(small(tmp_path / "g.onnx"))
