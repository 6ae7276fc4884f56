"""Ready graphs as teachers: they say what the same network says as a timm teacher, or are refused with a reason."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from precompute import joined, ready, teachers
from precompute.check import Live
from precompute.joined import export_ready
from precompute.taps import Tap
from precompute.targets import parse
from storage.errors import IdentityError, UserError
from storage.store import Store
from storage.testing import synthetic_shards
from storage.verify import Report, verify
from student.lesson import given_of
from student.network import network_of
from tests.conftest import World, run_precompute, teacher_of
from tests.precompute.graphs import FREE, MEANS, OUTPUTS, exported, made_by, node, small

HALF: dict[str, Any] = {"mean": (0.5,), "std": (0.5,)}
STAGES = [f"activations={name}" for name in OUTPUTS["cnn"][:4]]


def keep(
    store: Path, shards: list[str], path: Path, taps: list[str], targets: list[str], **changes: Any
) -> dict[str, Any]:
    """Precompute of a ready graph, as the command line asks for it; target's tap -> id."""
    wishes = [wish for text in targets for wish in parse(text)]
    given = ready.given_tensors(str(path), ready.named(taps), wishes)
    teacher = teachers.find(str(path), **{**HALF, **changes})
    result = run_precompute(store, shards, teacher, [], wishes=given)
    return dict(zip([wish.tap for wish in given], result["targets"], strict=True))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, world: World) -> Any:
    """Folder, a shard of 20 samples, and both tiny teachers as files."""
    folder = tmp_path_factory.mktemp("ready")
    shards = synthetic_shards(folder / "data", shards=1, samples=20)
    paths = {
        kind: exported(teacher_of(world.weights, kind), kind, folder / f"{kind}-graph.onnx") for kind in ("cnn", "vit")
    }
    return folder, shards, paths


@pytest.fixture(scope="module")
def kept(place: Any, world: World) -> Any:
    """A store with both networks, each as a file and as a timm teacher; their targets by tap."""
    folder, shards, paths = place
    store = folder / "store"
    vit = ["tokens=tokens", "class_token=cls", "logits=logits"]
    vit += [f"attention={name}" for name in made_by(paths["vit"], "Softmax")]
    wanted = {
        "cnn": ([*STAGES, "logits=logits"], ["activations,grid=8,codec=f32", "logits"]),
        "vit": (vit, [f"{tap},codec=f32" for tap in ("tokens", "class_token", "logits", "attention")]),
    }
    mine = {kind: keep(store, shards, paths[kind], *wanted[kind]) for kind in wanted}
    theirs = {}
    for kind, (_, targets) in wanted.items():
        result = run_precompute(store, shards, teacher_of(world.weights, kind), targets)
        theirs[kind] = dict(zip(mine[kind], result["targets"], strict=True))
    return Store.open(store), mine, theirs


# ---------------------------------------------------------------------------------------------- same numbers


@pytest.mark.parametrize(
    ("kind", "tap"),
    [
        ("cnn", "activations"),
        ("cnn", "logits"),
        *(("vit", t) for t in ("tokens", "class_token", "logits", "attention")),
    ],
)
def test_a_ready_graph_says_what_the_same_network_says_as_a_timm_teacher(kept: Any, kind: str, tap: str) -> None:
    store, mine, theirs = kept
    found, expected = (store.array(ids[kind][tap]).compute() for ids in (mine, theirs))
    assert found.shape == expected.shape
    assert expected.std() > 1e-3
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_losses_find_what_they_read_of_other_teachers(kept: Any) -> None:
    store, mine, theirs = kept
    own, other = (given_of(store, ids["vit"]["attention"]) for ids in (mine, theirs))
    for field in ("layers", "prefix", "heads", "classes"):
        assert own.teacher[field] == other.teacher[field]
    assert own.target["identity"]["layers"] == other.target["identity"]["layers"]
    own, other = (given_of(store, ids["cnn"]["activations"]) for ids in (mine, theirs))
    for key in ("stage", "channels"):
        assert [stage[key] for stage in own.target["stages"]] == [stage[key] for stage in other.target["stages"]]
    assert [stage["tap"] for stage in own.target["stages"]] == OUTPUTS["cnn"][:4]
    assert own.target["axes"] == other.target["axes"]


def test_layers_and_class_rows_are_chosen_of_the_named_tensors(place: Any, kept: Any, tmp_path: Path) -> None:
    _, shards, paths = place
    store = kept[0]
    chosen = keep(tmp_path / "S", shards, paths["cnn"], STAGES, ["activations,layers=4+2,grid=5,codec=f32"])
    teacher = teacher_of(dict.fromkeys(["cnn"], store.teachers()["cnn"]["weights"]), "cnn")
    result = run_precompute(tmp_path / "S", shards, teacher, ["activations,layers=4+2,grid=5,codec=f32"])
    other = Store.open(tmp_path / "S")
    manifest = other.target(chosen["activations"])
    assert [stage["tap"] for stage in manifest["stages"]] == ["stage4", "stage2"]
    found, expected = (other.array(id).compute() for id in (chosen["activations"], *result["targets"]))
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


# ---------------------------------------------------------------------------------------------- identity


def test_contract_11_another_tap_is_a_target_of_the_same_teacher(place: Any, tmp_path: Path) -> None:
    path = small(tmp_path / "g.onnx", [*MEANS, node("Relu", "x", "a"), node("Neg", "x", "b")])
    store, shards = tmp_path / "S", place[1]
    first = keep(store, shards, path, ["logits=y"], ["logits"])
    before = (store / "teachers/g/manifest.json").read_bytes()
    second = keep(store, shards, path, ["activations=a"], ["activations"])
    third = keep(store, shards, path, ["activations=b"], ["activations"])
    assert (store / "teachers/g/manifest.json").read_bytes() == before
    manifests = Store.open(store).targets()
    assert len({*first.values(), *second.values(), *third.values()}) == len(manifests) == 3
    assert len({manifest["identity"]["teacher"] for manifest in manifests.values()}) == 1
    assert manifests[third["activations"]]["identity"]["tensors"] == ["b"]
    assert keep(store, shards, path, ["logits=y"], ["logits"]) == first


def test_contract_5_another_file_or_normalisation_under_its_name_is_refused(place: Any, tmp_path: Path) -> None:
    path, store, shards = small(tmp_path / "g.onnx"), tmp_path / "S", place[1]
    keep(store, shards, path, ["logits=y"], ["logits"])
    with pytest.raises(IdentityError, match=r"mean: expected .*0\.5.*found .*0\.4.*\n.*--as g-2"):
        keep(store, shards, path, ["logits=y"], ["logits"], mean=(0.4,))
    model = onnx.load(str(path))
    model.producer_name = "somebody else"
    onnx.save(model, str(path))
    with pytest.raises(IdentityError, match="weights sha256: expected"):
        keep(store, shards, path, ["logits=y"], ["logits"])


def test_identities_of_timm_targets_are_what_they_were(kept: Any) -> None:
    store, _, theirs = kept
    for ids in theirs.values():
        for id in ids.values():
            assert set(store.target(id)["identity"]) == {"teacher", "bank", "tap", "layers", "grid", "codec"}
            assert "network" not in store.target(id)


def test_the_same_file_makes_the_same_graph_wherever_it_lies(place: Any, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    graphs = []
    for path in (place[2]["vit"], Path(shutil.copy(place[2]["vit"], tmp_path / "moved.onnx"))):
        taps = [Tap("class_token", tensors=("cls",)), Tap("logits", tensors=("logits",))]
        graphs.append(export_ready(teachers.find(str(path), **HALF), taps, 32, images).graph)
    assert graphs[0] == graphs[1]
    model = onnx.load_from_string(graphs[0])
    onnx.checker.check_model(model)
    assert [value.name for value in model.graph.input] == ["images"]
    assert [value.name for value in model.graph.output] == ["tap0", "tap1"]
    for word in (b"site-packages", b"/tmp", str(Path.home()).encode(), b".py"):
        assert word not in graphs[0]


# ---------------------------------------------------------------------------------------------- verify


def test_verify_asks_the_file_by_itself_or_else_the_stored_graph(place: Any, tmp_path: Path) -> None:
    _, shards, paths = place
    path = Path(shutil.copy(paths["cnn"], tmp_path / "g.onnx"))
    keep(tmp_path / "S", shards, path, [*STAGES, "logits=logits"], ["activations,grid=8", "logits"])
    store = Store.open(tmp_path / "S")

    def checked(*weights: str) -> Report:
        report = Report()
        return verify(store, shards, 10, look=Live(store, report, weights), report=report)

    report = checked()
    assert not report.failures
    assert report.targets_compared == 2 * 2 * 10
    assert report.compared_with["g"] == f"file run by itself ({path})"
    path.rename(tmp_path / "moved.onnx")
    assert checked().compared_with["g"] == f"stored graph ({path} not at hand: --weights F)"
    assert checked(str(tmp_path / "moved.onnx")).compared_with["g"].startswith("file run by itself")
    with pytest.raises(IdentityError, match="sha256: expected"):
        checked(str(paths["vit"]))
    live = Live(store, Report(), (str(tmp_path / "moved.onnx"),))
    live.teachers["g"]["identity"]["mean"] = [0.4, 0.5, 0.5]
    failures = verify(store, shards, 10, look=live, report=live.report).failures
    assert len(failures) == 40
    assert "it differs from the file run by itself" in failures[0]


def test_a_head_is_not_fitted_into_a_graph(kept: Any) -> None:
    store = kept[0]
    with pytest.raises(UserError, match=r"teacher vit-graph is a ready graph \(.*vit-graph.onnx\), and a head"):
        network_of(store.teachers()["vit-graph"], None, 3)


# ---------------------------------------------------------------------------------------------- kinds of files


def means(images: np.ndarray) -> np.ndarray:
    """What `small` says of view images as large as its input, with mean and std one half."""
    return np.asarray(images.astype(np.float64).mean((1, 2)) / 127.5 - 1)


def said(path: Path, tap: Tap | None = None, **changes: Any) -> tuple[np.ndarray, np.ndarray]:
    """Five view images of 16x16, and what a file's graph says of them."""
    images = np.random.default_rng(1).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    teacher = teachers.find(str(path), **{**HALF, **changes})
    (values,) = export_ready(teacher, [tap or Tap("logits", tensors=("y",))], 16, images).values
    return images, values


@pytest.mark.parametrize(
    "about",
    [
        {"shape": (1, 3, 16, 16)},
        {"shape": ("N", 3, "H", "W"), "size": 16},
        {"shape": (4, 16, 16, 3), "nodes": [node("ReduceMean", "x", "y", axes=[1, 2], keepdims=0)]},
        {"kind": TensorProto.FLOAT16},
        {"opset": 11},
        {"opset": 21},
        {"inputs": ("images",), "outputs": ("tap0",), "tap": "tap0"},
    ],
    ids=[
        "fixed batch",
        "open size",
        "channels last",
        "half precision",
        "opset 11",
        "opset 21",
        "our names",
    ],
)
def test_files_of_many_kinds_are_taken(tmp_path: Path, about: dict[str, Any]) -> None:
    tap, size = about.pop("tap", "y"), about.pop("size", None)
    images, values = said(small(tmp_path / "g.onnx", **about), Tap("logits", tensors=(tap,)), input_size=size)
    assert values.dtype == np.float32
    assert np.abs(values - means(images)).max() <= (2e-3 if "kind" in about else 1e-5)


def test_operators_that_cannot_be_brought_up_to_date_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unable(model: Any, version: int) -> Any:
        raise RuntimeError("No Adapter From Version $11 for Scan\nat some line")

    monkeypatch.setattr(joined.version_converter, "convert_version", unable)
    with pytest.raises(UserError, match=r"of version 11 .* \(No Adapter .* Scan\); export it again with opset 13 or"):
        said(small(tmp_path / "g.onnx", opset=11))


def test_weights_that_old_files_list_among_the_inputs_are_no_inputs(tmp_path: Path) -> None:
    nodes = [node("GlobalAveragePool", "x", "p"), node("Flatten", "p", "f"), node("MatMul", "f w", "y")]
    path = small(tmp_path / "g.onnx", nodes, weights={"w": 2 * np.eye(3, dtype=np.float32)})
    model = onnx.load(str(path))
    model.graph.input.append(onnx.helper.make_tensor_value_info("w", TensorProto.FLOAT, [3, 3]))
    onnx.save(model, str(path))
    images, values = said(path)
    assert np.abs(values - 2 * means(images)).max() < 1e-5
    assert ready.read(str(path)).parameters == 9


# ---------------------------------------------------------------------------------------------- refusals


FIXED = [
    node("GlobalAveragePool", "x", "p"), node("Reshape", "p shape", "y"),
]  # fmt: skip
MIXES = [
    node("GlobalAveragePool", "x", "p"), node("Flatten", "p", "f"), node("ReduceMean", "f", "m", axes=[0]),
    node("Sub", "f m", "y"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("about", "says"),
    [
        ({"nodes": FIXED, "weights": {"shape": np.array([1, 3])}, "shape": (1, 3, 16, 16)},
         r"cannot be run on 2 x \[1, 3, 16, 16\].*its batch is fixed at 1\n  export it again with a free batch"),
        ({"nodes": FIXED, "weights": {"shape": np.array([1, -1])}, "shape": (1, 3, 16, 16)},
         r"y is \[1, 6\] for 2 images; expected one row each; its batch is fixed at 1"),
        ({"nodes": MIXES}, r"y of two images together differs from that of each alone by .* \(allowed: 0.001\)"),
        ({"nodes": [node("Magic", "x", "y", domain="mine")], "domains": ["mine"]}, r"g.onnx: .*cannot be run: .*Magic"),
        ({"nodes": [node("Log", "x", "l"), node("GlobalAveragePool", "l", "p"), node("Flatten", "p", "y")]},
         "y: some of its values are not finite numbers"),
        ({"nodes": [node("Shape", "x", "y")]}, "y is int64; expected floating-point numbers"),
        ({"nodes": [node("Relu", "x", "y")]}, r"logits=y: expected \[B, K\], found \[5, 3, 16, 16\]"),
    ],
    ids=["fixed reshape", "silent reshape", "mixes images", "unknown operator", "not finite", "integers", "rank"],
)  # fmt: skip
def test_graphs_that_cannot_teach_are_refused(tmp_path: Path, about: dict[str, Any], says: str) -> None:
    path = small(tmp_path / "g.onnx", **about)
    with pytest.raises(UserError, match=says) as caught:
        said(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("about", "says"),
    [
        ({"inputs": ("x", "z")}, r"it has 2 inputs \(x, z\); expected one"),
        ({"kind": TensorProto.UINT8}, "its input x is uint8; expected normalised images: float32"),
        ({"kind": TensorProto.STRING}, "its input x is string"),
        ({"shape": ("N", 3, 16)}, r"its input x is \[N, 3, 16\]; expected a batch of RGB images"),
        ({"shape": ("N", 5, 16, 16)}, r"its input x is \[N, 5, 16, 16\]; expected three channels"),
        ({"shape": ("N", 3, 16, 24)}, r"is \[N, 3, 16, 24\]; only square images"),
        ({"shape": ("N", 3, 4, 4)}, r"--input-size 4: expected 8 to 4096"),
        ({"shape": ("N", 3, "H", "W")}, "it takes images of any size; say which it was made for: --input-size N"),
    ],
)
def test_other_inputs_than_square_images_are_refused(tmp_path: Path, about: dict[str, Any], says: str) -> None:
    path = small(tmp_path / "g.onnx", **about)
    with pytest.raises(UserError, match=says):
        teachers.find(str(path), **HALF)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x08\x07" * 100, b"\x89PNG\r\n\x1a\n" * 9, None])
def test_files_that_are_no_graphs_are_refused(place: Any, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "g.onnx"
    whole = place[2]["cnn"].read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(UserError, match=r"g\.onnx: .*is no ONNX file"):
        teachers.find(str(path), **HALF)


def test_files_that_cannot_be_read_or_are_too_large_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.onnx: cannot be read: No such file"):
        teachers.find(str(tmp_path / "nowhere.onnx"), **HALF)
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(UserError, match=r"folder\.onnx: cannot be read: Is a directory"):
        teachers.find(str(tmp_path / "folder.onnx"), **HALF)
    with pytest.raises(UserError, match="cannot be read: embedded null byte"):
        teachers.find("a\0b.onnx", **HALF)
    with (tmp_path / "huge.onnx").open("wb") as file:
        file.truncate(2**31)
    with pytest.raises(UserError, match=r"huge\.onnx: it has 2,147,483,648 bytes; one ONNX file holds at most"):
        teachers.find(str(tmp_path / "huge.onnx"), **HALF)


def test_a_graph_that_reads_other_files_is_refused(tmp_path: Path) -> None:
    path = small(tmp_path / "g.onnx", weights={"w": np.zeros(4, np.float32)})
    model = onnx.load(str(path))
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=r"g\.onnx: .*keeps 1 tensor\(s\) in other files \(w\); save it as one file"):
        teachers.find(str(path), **HALF)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mean": None}, "does not say how its images are normalised; give --mean and --std"),
        ({"std": None}, "does not say how its images are normalised; give --mean and --std"),
        ({"input_size": 32}, r"--input-size 32: .* takes images of 16x16 alone"),
        ({"weights": "w.pth"}, r"--weights: .*g\.onnx is a ready graph, whose weights and arguments are in it"),
        ({"arguments": {"a": 1}}, r"--teacher-arg: .* is a ready graph"),
        ({"called": "a/b"}, "--as 'a/b': a teacher's name has"),
    ],
)
def test_what_makes_no_sense_of_a_graph_is_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    path = small(tmp_path / "g.onnx", shape=FREE)
    with pytest.raises(UserError, match=says):
        teachers.find(str(path), **{**HALF, **changes})
    assert teachers.find(str(path), **HALF).name == "g"


# ---------------------------------------------------------------------------------------------- taps


@pytest.mark.parametrize(
    ("taps", "targets", "says"),
    [
        ([], [], r"name them by --tap TAP=TENSOR, such as --tap logits=stage1; its outputs: stage1, stage2"),
        (["logits"], [], "--tap logits: expected TAP=TENSOR"),
        (["logits="], [], "expected TAP=TENSOR"),
        (["logit=logits"], [], "no tap is called 'logit'. Did you mean 'logits'"),
        (["logits=logit"], [], r"cnn-graph.onnx: no tensor is called 'logit'. Did you mean 'logits'"),
        (["logits=image"], [], "no tensor is called 'image'. "),
        (["q=logits"], [], "q: a ready graph gives no q, k and v: .*--tap attention=TENSOR"),
        (["logits=logits", "logits=stage1"], [], "logits is one tensor, 2 are named: logits, stage1"),
        (["activations=stage1", "activations=stage1"], [], "activations: a tensor is named twice"),
        (["logits=logits"], ["activations"], "activations is wanted and no tensor is named for it"),
    ],
)
def test_taps_that_are_not_there_are_refused(place: Any, taps: list[str], targets: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        ready.given_tensors(str(place[2]["cnn"]), ready.named(taps), [w for text in targets for w in parse(text)])


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
        ("attention", (12, 8, 8), True, r"8 tokens are no square of patches with up to two tokens before it"),
        ("attention", (3, 8, 32), True, r"expected \[B, H, N, N\], found \[5, 3, 8, 32\]"),
        ("class_row", (48, 16), False, "its rows are no attention"),
        ("class_row", (48, 16), True, "16 tokens are no class token"),
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
        said(path, Tap(tap, None, 4 if tap == "activations" else None, ("y",)))


def test_layers_of_one_tap_are_alike(tmp_path: Path) -> None:
    nodes = [node("Reshape", "x a", "y"), node("Reshape", "x b", "z")]
    path = small(tmp_path / "g.onnx", nodes, weights={"a": np.array([-1, 16, 48]), "b": np.array([-1, 4, 192])})
    with pytest.raises(UserError, match=r"tokens: its layers differ: \[5, 16, 48\], \[5, 4, 192\]"):
        said(path, Tap("tokens", None, None, ("y", "z")))


def test_class_rows_and_what_a_network_is_read_off_their_shapes(tmp_path: Path) -> None:
    path = shaped(tmp_path / "g.onnx", 48, 16, softmax=True)
    nodes = onnx.load(str(path)).graph.node
    cut = np.array([5]), np.array([2])  # 16 values -> the first 5: one class token, 2x2 patches
    small(path, [nodes[0], node("Slice", "r zero five two", "s"), node("Softmax", "s", "y", axis=-1)],
          weights={"shape": np.array([-1, 48, 16]), "zero": np.array([0]), "five": cut[0], "two": cut[1]})  # fmt: skip
    teacher = teachers.find(str(path), **HALF)
    images = np.random.default_rng(1).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    exported = export_ready(teacher, [Tap("class_row", (1,), None, ("y",))], 16, images)
    assert exported.shapes == ((1, 48, 5),)
    assert exported.details[0]["network"] == {"layers": 1, "prefix": ["class"], "heads": 48}


@pytest.mark.parametrize(
    ("tokens", "prefix"),
    [(196, []), (197, ["class"]), (198, ["class", "distillation"]), (199, None), (1, []), (2, ["class"]),
     (3, ["class", "distillation"]), (0, None)],
)  # fmt: skip
def test_prefix_tokens_are_what_stands_beside_a_square(tokens: int, prefix: list[str] | None) -> None:
    assert ready.prefix_of(tokens) == prefix


def test_a_graph_that_joining_changed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = small(tmp_path / "other.onnx", shape=("N", 16, 16, 3), kind=TensorProto.UINT8, inputs=("images",), nodes=[
        node("Cast", "images", "c", to=TensorProto.FLOAT), node("ReduceMean", "c", "y", axes=[1, 2], keepdims=0),
    ])  # fmt: skip
    model = onnx.load(str(other))
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    monkeypatch.setattr(joined, "_joined", lambda alone, views: model.SerializeToString())
    with pytest.raises(UserError, match=r"logits: .* differs from the file run by itself by [0-9.e+-]+"):
        said(small(tmp_path / "g.onnx"))
