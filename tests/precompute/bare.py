"""Stores and shards that take no time to make: a teacher that only averages pixels, a few images under many keys."""

from __future__ import annotations

import dataclasses
import io
import tarfile
from typing import TYPE_CHECKING, Any

import onnx

from precompute.engine.tasks import ShardTask, TargetOutput
from storage.objects import json_record
from storage.store import banks
from storage.store.manifests import TargetManifest
from storage.store.store import Store
from storage.views.policy import Policy, policy
from tests.manifests import teacher_manifest

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image


@dataclasses.dataclass(frozen=True)
class Bare:
    """A store with a teacher that only averages pixels: `[n, 3, grid, grid]`. Nothing is exported."""

    folder: Path
    store: Store
    policy: Policy
    graph: str
    output: TargetOutput

    def task(self, url: str, views: int = 2) -> ShardTask:
        return ShardTask(
            store=self.store,
            url=url,
            policy=self.policy,
            teacher="averages",
            graph=self.graph,
            outputs=(self.output,),
            views=views,
        )


def bare(folder: Path, line: str = "deit", size: int = 32, codec: str = "u8") -> Bare:
    from onnx import TensorProto, helper

    grid = 8
    side, views = size // grid, policy(line, size)
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("Transpose", ["floats"], ["planes"], perm=[0, 3, 1, 2]),
            helper.make_node("AveragePool", ["planes"], ["maps"], kernel_shape=[side, side], strides=[side, side]),
        ],
        "averages",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", size, size, 3])],
        [helper.make_tensor_value_info("maps", TensorProto.FLOAT, ["n", 3, grid, grid])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    store = Store.create(folder)
    store.add(banks.bank_manifest(views))
    teacher = {
        "model": "none",
        "arguments": {},
        "weights sha256": "none",
        "input size": size,
        "mean": [0, 0, 0],
        "std": [1, 1, 1],
    }
    store.add(teacher_manifest(teacher, id="averages", network="other", layers=0))
    file = folder.with_suffix(".onnx")
    file.write_bytes(model.SerializeToString())
    digest = store.add_graph("averages", file)
    identity = {
        "teacher": json_record.digest_of(teacher),
        "bank": views.bank,
        "tap": "activations",
        "layers": None,
        "grid": grid,
        "codec": codec,
    }
    id = f"averages-activations-{codec}-{json_record.digest_of(identity)[:8]}"
    about = {
        "teacher": "averages",
        "graph": digest,
        "output": 0,
        "sample_shape": [3, grid, grid],
        "maps": 2,
        "axes": ["map", "y", "x"],
        "values": "plain",
        "parity": None,
        "attention_error": None,
        "format": 1,
        "kind": "target",
        "id": id,
        "identity": identity,
    }
    target = store.add(TargetManifest.model_validate(about))
    return Bare(folder, store, views, digest, TargetOutput.of(target))


def tar(path: Path, count: int, images: list[bytes], ending: str = "png") -> str:
    """A shard of so many samples that takes no time to make: a few images under many keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as file:
        for i in range(count):
            data = images[i % len(images)]
            info = tarfile.TarInfo(f"{path.stem}-{i:06d}.{ending}")
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return str(path)


def encoded(image: Image.Image, kind: str = "PNG", **more: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return buffer.getvalue()
