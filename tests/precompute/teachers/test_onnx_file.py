"""Ready graphs as teachers: they say what the same network says as a timm teacher, or are refused with a reason."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from precompute.export.onnx_file import export_ready
from precompute.taps import Tap
from precompute.taps.target_spec import parse_target
from precompute.teachers import onnx_file
from precompute.teachers import teacher as teachers
from precompute.verify_targets import LiveTargets
from storage.errors import IdentityError, UserError
from storage.store.store import Store
from storage.store.verify import VerifyReport, verify
from storage.testing import synthetic_shards
from student.fit_teacher.network import network_of
from student.targets.stored_target import stored_target
from tests.conftest import World, run_precompute, teacher_of
from tests.precompute.graphs import HALF, MEANS, OUTPUTS, exported, made_by, means, node, said, small

STAGES = [f"activations={name}" for name in OUTPUTS["cnn"][:4]]


def keep(
    store: Path, shards: list[str], path: Path, taps: list[str], targets: list[str], **changes: Any
) -> dict[str, Any]:
    """Precompute of a ready graph, as the command line asks for it; target's tap -> id."""
    wishes = [wish for text in targets for wish in parse_target(text)]
    given = onnx_file.given_tensors(str(path), onnx_file.named_outputs(taps), wishes)
    teacher = teachers.find_teacher(str(path), **{**HALF, **changes})
    result = run_precompute(store, shards, teacher, given)
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
    own, other = (stored_target(store, ids["vit"]["attention"]) for ids in (mine, theirs))
    for field in ("layers", "prefix", "heads", "classes"):
        assert getattr(own.teacher, field) == getattr(other.teacher, field)
    assert own.target.identity.layers == other.target.identity.layers
    own, other = (stored_target(store, ids["cnn"]["activations"]) for ids in (mine, theirs))
    stages = [[(stage.stage, stage.channels) for stage in given.target.stages] for given in (own, other)]
    assert stages[0] == stages[1]
    assert [stage.tap for stage in own.target.stages] == OUTPUTS["cnn"][:4]
    assert own.target.axes == other.target.axes


def test_layers_and_class_rows_are_chosen_of_the_named_tensors(place: Any, kept: Any, tmp_path: Path) -> None:
    _, shards, paths = place
    store = kept[0]
    chosen = keep(tmp_path / "S", shards, paths["cnn"], STAGES, ["activations,layers=4+2,grid=5,codec=f32"])
    teacher = teacher_of(dict.fromkeys(["cnn"], store.teachers()["cnn"].weights), "cnn")
    result = run_precompute(tmp_path / "S", shards, teacher, ["activations,layers=4+2,grid=5,codec=f32"])
    other = Store.open(tmp_path / "S")
    manifest = other.target(chosen["activations"])
    assert [stage.tap for stage in manifest.stages] == ["stage4", "stage2"]
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
    assert len({manifest.identity.teacher for manifest in manifests.values()}) == 1
    assert manifests[third["activations"]].identity.tensors == ("b",)
    assert keep(store, shards, path, ["logits=y"], ["logits"]) == first


def test_contract_5_another_file_or_normalization_under_its_name_is_refused(place: Any, tmp_path: Path) -> None:
    path, store, shards = small(tmp_path / "g.onnx"), tmp_path / "S", place[1]
    keep(store, shards, path, ["logits=y"], ["logits"])
    with pytest.raises(IdentityError, match=r"mean: the store has .*0\.5.*asked for .*0\.4.*\n.*`teacher_name=g-2`"):
        keep(store, shards, path, ["logits=y"], ["logits"], mean=(0.4,))
    model = onnx.load(str(path))
    model.producer_name = "somebody else"
    onnx.save(model, str(path))
    with pytest.raises(IdentityError, match="weights sha256: the store has"):
        keep(store, shards, path, ["logits=y"], ["logits"])


def test_identities_of_timm_targets_are_what_they_were(kept: Any) -> None:
    store, _, theirs = kept
    for ids in theirs.values():
        for id in ids.values():
            content = store.target(id).plain()
            native = {"native"} if content["identity"]["tap"] == "activations" else set()
            assert content["identity"].keys() == {"teacher", "bank", "tap", "layers", "grid", "codec"} | native
            assert "network" not in content


def test_the_same_file_makes_the_same_graph_wherever_it_lies(place: Any, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    graphs = []
    for i, path in enumerate((place[2]["vit"], Path(shutil.copy(place[2]["vit"], tmp_path / "moved.onnx")))):
        taps = [Tap("class_token", tensors=("cls",)), Tap("logits", tensors=("logits",))]
        file = tmp_path / f"{i}.onnx"
        export_ready(teachers.find_teacher(str(path), **HALF), taps, 32, images, file=file)
        graphs.append(file.read_bytes())
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

    def checked(*weights: str) -> VerifyReport:
        report = VerifyReport()
        return verify(store, shards, samples=10, look=LiveTargets(store, report, weights), report=report)

    report = checked()
    assert not report.failures
    assert report.targets_compared == 2 * 2 * 10
    assert report.compared_with["g"] == f"file run by itself ({path})"
    path.rename(tmp_path / "moved.onnx")
    assert checked().compared_with["g"] == f"stored graph ({path} not found: `weights=F`)"
    assert checked(str(tmp_path / "moved.onnx")).compared_with["g"].startswith("file run by itself")
    with pytest.raises(IdentityError, match="sha256: expected"):
        checked(str(paths["vit"]))
    live = LiveTargets(store, VerifyReport(), (str(tmp_path / "moved.onnx"),))
    recorded = live.teachers["g"]
    changed = recorded.identity.model_copy(update={"mean": (0.4, 0.5, 0.5)})
    live.teachers["g"] = recorded.model_copy(update={"identity": changed})
    failures = verify(store, shards, samples=10, look=live, report=live.report).failures
    assert len(failures) == 40
    assert "it differs from the file run by itself" in failures[0]


def test_a_head_is_not_fitted_into_a_graph(kept: Any) -> None:
    store = kept[0]
    with pytest.raises(UserError, match=r"teacher vit-graph is a ready graph \(.*vit-graph.onnx\), and a head"):
        network_of(store.teachers()["vit-graph"], None, 3)


# ---------------------------------------------------------------------------------------------- kinds of files


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

    monkeypatch.setattr("onnx.version_converter.convert_version", unable)
    with pytest.raises(UserError, match=r"of version 11 .* \(No Adapter .* Scan\)\n  Export it again with opset 13 or"):
        said(small(tmp_path / "g.onnx", opset=11))


def test_weights_that_old_files_list_among_the_inputs_are_no_inputs(tmp_path: Path) -> None:
    nodes = [node("GlobalAveragePool", "x", "p"), node("Flatten", "p", "f"), node("MatMul", "f w", "y")]
    path = small(tmp_path / "g.onnx", nodes, weights={"w": 2 * np.eye(3, dtype=np.float32)})
    model = onnx.load(str(path))
    model.graph.input.append(onnx.helper.make_tensor_value_info("w", TensorProto.FLOAT, [3, 3]))
    onnx.save(model, str(path))
    images, values = said(path)
    assert np.abs(values - 2 * means(images)).max() < 1e-5
    assert onnx_file.read_graph(str(path)).parameters == 9
