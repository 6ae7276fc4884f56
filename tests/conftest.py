"""What many tests share: synthetic shards, tiny teachers with weights, and a store made of both."""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import os
import shutil
import signal
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import jaxtyping
import pytest
from filelock import FileLock

from tests import shapes
from tests.typed import present

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

# Before torch is imported anywhere: two test workers share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Before these packages are imported: their functions check the shapes that they state.
jaxtyping.install_import_hook(["student.alignment", "student.losses"], f"{shapes.__name__}.check_shapes")

# No example of a property has to end within some milliseconds: other processes use the cores too.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

# Where the tests run in the background of a script, interrupts are ignored there and would be by all children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[1]  # of the repository
SHARED = ROOT.parent / "shared"
HANGS = 1200  # seconds after which what a test waits for is taken to hang: far more than a busy machine needs


def pytest_collection_finish() -> None:
    """Modules and collected tests stay until the end: the garbage collector need not look at them again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Shard indexes are cached in a folder of the tests' own, for child processes too."""
    from storage.shards.index import cache_folder

    before = os.environ.get("TEACHER_STORE_CACHE")
    os.environ["TEACHER_STORE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    cache_folder.cache_clear()
    yield
    if before is None:
        del os.environ["TEACHER_STORE_CACHE"]
    else:
        os.environ["TEACHER_STORE_CACHE"] = before


def of_all_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this run of the tests share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def exported_anew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Graphs that were made in this run of the tests are not made again, which takes seconds each.

    Gives what makes one anyway. All commands in processes of their own make theirs. The exporter's table of operators,
    which it only reads, is built once too: that is a sixth of the time of a small export.
    """

    from torch.onnx._internal.exporter._registration import ONNXRegistry

    import precompute.export.pytorch

    folder = of_all_workers(tmp_path_factory) / "graphs"
    folder.mkdir(exist_ok=True)
    graph = precompute.export.pytorch.graph_of

    def once(module: Any, views: torch.Tensor, outputs: Any) -> list[bytes]:
        about = (repr(module), module.taps, module.input_size, tuple(views.shape), tuple(outputs))
        key = hashlib.sha256(repr(about).encode())
        for name, value in module.state_dict().items():
            key.update(f"{name} {value.dtype}".encode() + value.numpy().tobytes())
        made = folder / key.hexdigest()
        with FileLock(f"{made}.lock"):
            if not made.exists():
                made.write_bytes(b"".join(graph(module, views, outputs)))
        return [made.read_bytes()]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precompute.export.pytorch, "graph_of", once)
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield graph


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real images and weights; tests that use it skip where there is none."""
    if not (SHARED / "data").is_dir():
        pytest.skip("no folder with real data beside this checkout")
    return SHARED


class Quiet:
    """Progress that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def start(self, what: str, total: int) -> None:
        pass

    def advance(self, steps: int) -> None:
        pass

    def expect(self, total: int) -> None:
        pass


@dataclass
class World:
    """Two synthetic shards, two tiny teachers, and a store with targets of both in one bank."""

    folder: Path
    shards: list[str]
    weights: dict[str, str]
    store: Path
    targets: dict[str, str]  # "activations f32" -> id

    def copy(self, to: Path) -> Path:
        """A copy of the store that a test may damage."""
        return Path(shutil.copytree(self.store, to))


def write_teacher(path: Path, spec: tuple[str, dict[str, Any]], seed: int = 0) -> str:
    """Random weights of a tiny teacher, with statistics that are not the trivial ones."""
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    model = timm.create_model(spec[0], num_classes=3, **spec[1])
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                present(module.running_mean).normal_(0, 0.1)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)
            if isinstance(module, torch.nn.Linear):
                module.weight.mul_(3)  # attention that is not nearly uniform
    save_file(model.state_dict(), path)
    return str(path)


def teacher_of(world_weights: dict[str, str], kind: str, **changes: Any) -> Any:
    """The tiny `cnn` or `vit` teacher."""
    from precompute.teachers import teacher as teachers
    from storage.testing import TINY_CNN, TINY_VIT

    name, arguments = TINY_CNN if kind == "cnn" else TINY_VIT
    settings: dict[str, Any] = {
        "weights": world_weights[kind],
        "arguments": {**arguments, "num_classes": 3},
        "input_size": 64 if kind == "cnn" else 32,
        "mean": (0.5,),
        "std": (0.5,),
        "teacher_name": kind,
    }
    return teachers.find_teacher(name, **{**settings, **changes})


def run_precompute(store: Any, shards: list[str], teacher: Any, targets: list[Any], **changes: Any) -> dict[str, Any]:
    """Precompute under `light`, size 32, two views; targets as text or parsed."""
    from precompute.engine import dask_runner
    from precompute.request import PrecomputeRequest
    from precompute.run import precompute
    from precompute.taps.target_spec import parse_target
    from storage.errors import UserError
    from storage.store.store import Store
    from storage.views.policy import policy

    settings: dict[str, Any] = {
        "targets": [s for t in targets for s in (parse_target(t) if isinstance(t, str) else [t])],
        "policy": policy("light", 32),
        "policy_fields": frozenset({"line", "size"}),
        "num_views": 2,
        "provider": "cpu",
    }
    place = Store.create(store) if isinstance(store, str | Path) else store
    dask_runner.held_session.clear()  # a test may have put another session in its place
    result = precompute(place, PrecomputeRequest(shards=shards, teacher=teacher, **{**settings, **changes}), Quiet())
    if result.failures:
        raise UserError("\n".join(failure.error for failure in result.failures))
    return asdict(result)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """See `World`. 2 × 150 samples of 3 classes; grid 8 for patch-4 students at 32×32."""
    folder = of_all_workers(tmp_path_factory) / "world"
    with FileLock(f"{folder}.lock"):
        if not (folder / "made.json").exists():
            folder.mkdir()
            (folder / "made.json").write_text(json.dumps(_make_world(folder)))
    return World(folder, **json.loads((folder / "made.json").read_text()), store=folder / "store")


def _make_world(folder: Path) -> dict[str, Any]:
    """Its shards, weights and targets."""
    from storage.testing import TINY_CNN, TINY_VIT, synthetic_shards

    shards = synthetic_shards(folder / "data", shards=2, samples=150, classes=3)
    weights = {
        "cnn": write_teacher(folder / "cnn.safetensors", TINY_CNN),
        "vit": write_teacher(folder / "vit.safetensors", TINY_VIT, seed=1),
    }
    cnn = run_precompute(
        folder / "store",
        shards,
        teacher_of(weights, "cnn"),
        ["activations,grid=8,codec=f32", "activations,grid=8,codec=u8", "logits"],
    )
    vit = run_precompute(
        folder / "store", shards, teacher_of(weights, "vit"), ["class_row", "class_token", "q,k,layers=last"]
    )
    names = ["activations f32", "activations u8", "logits", "class_row", "class_token", "q", "k"]
    targets = dict(zip(names, [*cnn["targets"], *vit["targets"]], strict=True))
    return {"shards": shards, "weights": weights, "targets": targets}
