"""The exported graph is the teacher: same numbers for any batch, same bytes from anywhere, or nothing is kept."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch.nn import functional as F

from precompute.engine import session as sessions
from precompute.export import pytorch
from precompute.taps import Tap, cnn_stages
from precompute.teachers import teacher as teachers
from storage.errors import UserError
from storage.store.store import Store
from storage.testing import TINY_CNN, TINY_VIT, synthetic_shards
from tests.conftest import ROOT, run_precompute, teacher_of, write_teacher
from tests.precompute.networks import attention_modules
from tests.typed import present

COLORS = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)}

# name -> kind of teacher, view size, taps. The teachers' inputs are 64 (cnn) and 32 (vit) pixels wide.
CASES: dict[str, tuple[str, int, list[Tap]]] = {
    "cnn": ("cnn", 64, [Tap("activations", layers=None, grid=8), Tap("logits")]),
    "cnn, views enlarged": ("cnn", 32, [Tap("activations", layers=(2, 4), grid=3), Tap("logits")]),
    "cnn, views reduced": ("cnn", 96, [Tap("logits"), Tap("activations", layers=(1,), grid=5)]),
    "vit": (
        "vit",
        32,
        [Tap("class_row"), Tap("class_token"), Tap("q", layers=(3,)), Tap("k", layers=(1, 2)), Tap("logits")],
    ),
    "vit, views reduced": ("vit", 50, [Tap("class_row", layers=(3, 1)), Tap("logits")]),
}


@dataclass
class Case:
    teacher: teachers.Teacher
    size: int
    taps: list[Tap]
    exported: pytorch.Exported
    graph: Path
    session: sessions.Session

    def views(self, count: int) -> np.ndarray:
        return pixels(count, self.size)


def pixels(count: int, size: int, seed: int = 0) -> np.ndarray:
    """Images with large smooth shapes and noise, that use the whole range."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.random((count, 3, 5, 5)))
    smooth = F.interpolate(coarse, (size, size), mode="bilinear").permute(0, 2, 3, 1).numpy()
    return (255 * (1.4 * smooth - 0.2 + 0.3 * rng.random((count, size, size, 3)) - 0.15)).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("weights")
    return {
        "cnn": write_teacher(folder / "cnn.safetensors", TINY_CNN),
        "vit": write_teacher(folder / "vit.safetensors", TINY_VIT),
    }


@pytest.fixture(scope="module")
def cases(weights: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Each case is exported when it is first asked for."""
    made: dict[str, Case] = {}
    folder = tmp_path_factory.mktemp("graphs")

    def case(name: str) -> Case:
        if name not in made:
            kind, size, taps = CASES[name]
            teacher = teacher_of(weights, kind, **COLORS)
            file = folder / f"{name}.onnx"
            exported = pytorch.export(teacher, taps, size, pixels(4, size, seed=9), "cpu", file=file)
            made[name] = Case(teacher, size, taps, exported, file, sessions.open_session(file, "cpu"))
        return made[name]

    return case


def reference(case: Case, views: np.ndarray) -> list[np.ndarray]:
    """The taps by other means: F.interpolate, the network's forward, its unfused attention, its modules' outputs."""
    model: Any = teachers.load_teacher(case.teacher)
    side = case.teacher.input_size
    x = torch.from_numpy(views).permute(0, 3, 1, 2).float() / 255
    if case.size != side:
        x = F.interpolate(x, (side, side), mode="bicubic", align_corners=False, antialias=case.size > side).clamp(0, 1)
    mean, std = (torch.tensor(COLORS[name]).view(3, 1, 1) for name in ("mean", "std"))
    kept: dict[str, list[torch.Tensor]] = {"row": [], "q": [], "k": [], "maps": [], "tokens": []}
    if case.teacher.model == TINY_VIT[0]:
        model.norm.register_forward_hook(lambda m, a, output: kept["tokens"].append(output))
        for layer in attention_modules(model):
            layer.fused_attn = False
            layer.attn_drop.register_forward_pre_hook(lambda m, args: kept["row"].append(args[0][:, :, 0]))
            layer.q_norm.register_forward_hook(lambda m, a, output: kept["q"].append(output))
            layer.k_norm.register_forward_hook(lambda m, a, output: kept["k"].append(output))
    else:
        for _, norm in cnn_stages(model):
            norm.register_forward_hook(lambda m, a, output: kept["maps"].append(output.clone()))
    with torch.no_grad():
        logits = model((x - mean) / std)
    found = []
    for tap in case.taps:
        if tap.name == "logits":
            found.append(logits)
        elif tap.name == "class_token":
            found.append(kept["tokens"][0][:, 0])
        elif tap.name == "activations":
            chosen = [kept["maps"][n - 1] for n in tap.layers or range(1, 5)]
            new = (present(tap.grid), present(tap.grid))
            found.append(torch.cat([F.interpolate(maps, new, mode="bicubic") for maps in chosen], 1))
        else:
            chosen = kept["row" if tap.name == "class_row" else tap.name]
            found.append(torch.stack([chosen[n - 1] for n in tap.layers or (1, 2, 3)], 1))
    return [tensor.numpy() for tensor in found]


def assert_close(found: list[np.ndarray], expected: list[np.ndarray], tolerance: float = 1e-4) -> None:
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.shape == theirs.shape
        assert mine.dtype == np.float32
        assert theirs.std() > 1e-3, "outputs that hardly differ would prove little"
        assert np.abs(mine - theirs).max() <= tolerance * np.abs(theirs).max()


def nothing_is_stored(folder: Path) -> bool:
    store = Store.open(folder)
    graphs = [key for key in store.objects.walk("teachers") if key.endswith(".onnx")]
    return not (store.targets() or graphs or store.done())


# ---------------------------------------------------------------------------------------------- same numbers


@pytest.mark.parametrize("count", [1, 2, 5, 17])
@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_the_graph_gives_what_the_live_teacher_gives_for_any_batch(cases: Any, name: str, count: int) -> None:
    case = cases(name)
    module = pytorch.live_teacher(case.teacher, case.taps, case.size)
    with torch.no_grad():
        expected = [output.numpy() for output in module(torch.from_numpy(case.views(count)))]
    assert_close(case.session.run(case.views(count)), expected)


@pytest.mark.parametrize("name", CASES)
def test_the_graph_gives_what_the_network_itself_gives_on_resized_normalized_images(cases: Any, name: str) -> None:
    case = cases(name)
    assert_close(case.session.run(case.views(5)), reference(case, case.views(5)))


def test_views_are_reduced_with_antialiasing(cases: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case, plain = cases("cnn, views reduced"), F.interpolate
    monkeypatch.setattr(F, "interpolate", lambda *args, antialias=False, **more: plain(*args, **more))
    with pytest.raises(AssertionError):
        assert_close(case.session.run(case.views(5)), reference(case, case.views(5)), 1e-2)


@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_outputs_depend_neither_on_threads_nor_on_runs_side_by_side(cases: Any, kind: str, monkeypatch: Any) -> None:
    case = cases(kind)
    views = case.views(11)
    expected = sessions.open_session(case.graph, "cpu", 1).run(views)
    for threads, side_by_side, batch in ((3, 16, 2), (4, 2, 2), (2, 16, 5)):
        monkeypatch.setattr(sessions, "SIDE_BY_SIDE", side_by_side)
        monkeypatch.setattr(sessions, "BATCH", {"cpu": batch})
        found = sessions.open_session(case.graph, "cpu", threads).run(views)
        assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("count", [15, 16, 17, 33])
def test_large_inputs_are_run_in_batches_that_lose_nothing(cases: Any, count: int) -> None:
    import onnxruntime

    case = cases("vit")
    views = case.views(count)
    sizes: list[int] = []
    session = onnxruntime.InferenceSession(case.graph)

    class Counting:
        def run(self, names: None, inputs: dict[str, np.ndarray]) -> Any:
            sizes.append(len(inputs["images"]))
            return session.run(names, inputs)

    found = sessions.Session(Counting(), "cpu").run(views)
    assert sum(sizes) == count
    assert max(sizes) <= sessions.BATCH["cpu"]
    one_by_one = [
        np.concatenate(parts) for parts in zip(*(case.session.run(view[None]) for view in views), strict=True)
    ]
    assert_close(found, one_by_one, 1e-5)


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_described_as_they_are(cases: Any, name: str) -> None:
    case = cases(name)
    outputs = case.session.run(case.views(2))
    assert [output.shape[1:] for output in outputs] == list(case.exported.shapes)
    assert case.exported.taps == tuple(case.taps)
    assert all(0 <= parity <= 1e-4 for parity in case.exported.parity)
    for tap, detail, output in zip(case.taps, case.exported.details, outputs, strict=True):
        assert len(tap.info.axes) == output.ndim - 1
        if tap.name == "activations":
            assert [stage.stage for stage in detail["stages"]] == list(tap.layers or (1, 2, 3, 4))
            assert sum(stage.channels for stage in detail["stages"]) == output.shape[1]


def test_the_attention_check_was_made_where_there_is_attention(cases: Any) -> None:
    assert cases("vit").exported.attention_error <= 1e-6
    assert cases("cnn").exported.attention_error is None


# ---------------------------------------------------------------------------------------------- same bytes


def test_exporting_again_from_another_place_gives_the_same_bytes(
    cases: Any, weights: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported_anew: Any
) -> None:
    monkeypatch.setattr(pytorch, "graph_of", exported_anew)
    case = cases("vit, views reduced")
    elsewhere = str(shutil.copy(weights["vit"], tmp_path / "w.safetensors"))
    monkeypatch.chdir(tmp_path)
    teacher = teacher_of({"vit": elsewhere}, "vit", teacher_name="other", **COLORS)
    pytorch.export(teacher, case.taps, case.size, pixels(4, case.size, seed=1), "cpu", file=tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == case.graph.read_bytes()


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_a_graph_names_no_file_and_no_folder_of_the_machine_that_made_it(cases: Any, name: str) -> None:
    graph = cases(name).graph.read_bytes()
    for path in (str(ROOT), str(Path.home()), str(Path(torch.__file__).parent), "taps.py", "site-packages"):
        assert path.encode() not in graph
    model = onnx.load_from_string(graph)
    onnx.checker.check_model(model)
    assert not model.metadata_props
    assert [value.name for value in model.graph.input] == ["images"]


# ---------------------------------------------------------------------------------------------- refusals


def test_a_graph_of_other_weights_is_refused_with_figures(
    cases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = cases("cnn, views enlarged")
    other = write_teacher(tmp_path / "other.safetensors", TINY_CNN, seed=7)
    monkeypatch.setattr(pytorch, "graph_of", lambda module, views, outputs: [case.graph.read_bytes()])
    teacher = teacher_of({"cnn": other}, "cnn", **COLORS)
    with pytest.raises(UserError, match=r"cnn: activations: .* differs from PyTorch by [0-9.e+-]+ .*allowed: 0.001"):
        pytorch.export(teacher, case.taps, case.size, case.views(4), "cpu", file=tmp_path / "g.onnx")


def test_nothing_is_stored_of_a_graph_that_differs(cases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases("cnn, views enlarged")
    shards = synthetic_shards(tmp_path / "data", 1, 6)
    monkeypatch.setattr(pytorch, "graph_of", lambda module, views, outputs: [case.graph.read_bytes()])
    monkeypatch.setattr(pytorch, "PARITY", -1.0)
    targets = ["activations,layers=2+4,grid=3,native=false", "logits"]
    with pytest.raises(UserError, match=r"differs from PyTorch by .*allowed: -1\); nothing was stored"):
        run_precompute(tmp_path / "store", shards, case.teacher, targets)
    assert nothing_is_stored(tmp_path / "store")


def test_a_difference_that_is_not_a_number_is_refused(cases: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases("cnn, views enlarged")
    found = case.session.run(case.views(2))
    wrong = [np.full_like(output, np.nan) for output in found]
    with pytest.raises(UserError, match="differs from PyTorch by nan"):
        pytorch.compare(found, wrong, case.taps, case.teacher.name)


def test_contract_12_nothing_is_stored_of_attention_that_is_not_what_the_network_uses(tmp_path: Path) -> None:
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    name = "vit_relpos_base_patch16_cls_224"
    weights = write_teacher(tmp_path / "w.safetensors", (name, arguments))
    teacher = teachers.find_teacher(
        name, weights=weights, arguments={**arguments, "num_classes": 3}, teacher_name="relpos", mean=(0.5,), std=(0.5,)
    )
    shards = synthetic_shards(tmp_path / "data", 1, 6)
    with pytest.raises(UserError, match=r"VisionTransformerRelPos: its attention layer 1 adds a bias to its scores"):
        run_precompute(tmp_path / "store", shards, teacher, ["class_row", "q"])
    assert nothing_is_stored(tmp_path / "store")


# ---------------------------------------------------------------------------------------------- sessions


def test_a_session_says_what_it_runs_on(cases: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    made: list[Any] = []

    class Known(onnxruntime.InferenceSession):  # type: ignore[misc]  # onnxruntime has no types
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            made.append(self)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Known)
    session = sessions.open_session(cases("vit").graph, "cpu")
    version = onnxruntime.__version__
    assert session.settings == {
        "onnxruntime": version,
        "provider": "cpu",
        "precision": "float32",
        "optimisation": "all",
        "tf32": False,
    }
    assert [one.get_providers() for one in made] == [["CPUExecutionProvider"]]


def test_cuda_that_is_not_there_is_an_error_and_auto_takes_the_cpu(cases: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    graph = cases("vit").graph
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UserError, match="`provider=cuda`: this onnxruntime has no CUDA"):
        sessions.open_session(graph, "cuda")
    assert sessions.open_session(graph, "auto").settings["provider"] == "cpu"


def test_cuda_that_falls_back_to_the_cpu_is_an_error(cases: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    graph, real = cases("vit").graph, onnxruntime.InferenceSession
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: both)
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda graph, options, providers: real(graph, options, providers=both[1:])
    )
    with pytest.raises(UserError, match="fell back to the CPU"):
        sessions.open_session(graph, "cuda")


@pytest.mark.parametrize("graph", [b"", b"garbage", b"\x08\x07" * 100])
def test_bytes_that_are_no_graph_are_refused(graph: bytes) -> None:
    with pytest.raises(UserError, match="the teacher's graph cannot be run"):
        sessions.open_session(graph, "cpu")


def test_a_graph_that_is_cut_off_is_refused(cases: Any) -> None:
    graph = cases("vit").graph.read_bytes()
    with pytest.raises(UserError, match="the teacher's graph cannot be run"):
        sessions.open_session(graph[: len(graph) // 2], "cpu")


@pytest.mark.parametrize("location", ["weights.bin", "../../etc/passwd", "/etc/passwd"])
def test_a_graph_that_reads_other_files_is_refused(location: str) -> None:
    """Tensors of a graph may lie in other files, and these could be any file of the machine."""
    import onnx
    from onnx import TensorProto, helper

    tensor = helper.make_tensor("secret", TensorProto.FLOAT, [4], b"\0" * 16, raw=True)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    output = helper.make_tensor_value_info("tap0", TensorProto.FLOAT, [4])
    graph = helper.make_graph([helper.make_node("Identity", ["secret"], ["tap0"])], "g", [], [output], [tensor])
    inner = helper.make_model(graph)
    assert isinstance(inner, onnx.ModelProto)
    with pytest.raises(UserError, match=r"keeps 1 tensor\(s\) in other files \(secret\)"):
        sessions.open_session(inner.SerializeToString(), "cpu")
