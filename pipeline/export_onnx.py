"""`export`: a student as an ONNX graph that says itself how it is fed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from precompute.engine.shard import block_views
from precompute.export.pytorch import CHECKED, export_student
from storage.errors import UserError
from storage.objects.atomic import atomic_write
from storage.shards.shard import open_shards
from student.models.attention_copy_hooks import attention_copy_hooks
from student.models.files import load_student

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def export(path: Path, shards: Sequence[str], out: Path) -> dict[str, Any]:
    """Write the graph of a student's file.

    Args:
        path: the student.
        shards: patterns of shards; the graph is checked on the first images of the first one, labeled or not.
        out: a new file.

    Raises:
        UserError: no such student, a file that is there, a shard of one image, or a graph that differs from PyTorch.
    """
    if out.exists():
        raise UserError(f"{out}: already exists; give another name with --out, or remove it")
    model, about = load_student(path)
    if (copies := attention_copy_hooks(model)) and not copies.fixed:
        raise UserError(
            f"{path}: this student attends with its teacher's attention, which a graph of it alone does not have; "
            "`pipeline predict` runs both"
        )
    shard = open_shards(shards)[0]
    if len(shard) < 2:
        raise UserError(f"{shard.url}: one image is too few to check a graph on; give another with --shards")
    images = np.ascontiguousarray(block_views(shard, about.evaluation_policy)[:CHECKED])
    properties = {"classes": about.classes, "size": about.img_size, "view": about.evaluation, "model": about.model}
    of_student = onnx.ModelProto()
    onnx.helper.set_model_props(of_student, {name: json.dumps(value) for name, value in properties.items()})
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as temporary:
        size = about.img_size
        export_student(model, size, mean=about.mean, std=about.std, images=images, name=str(path), file=temporary)
        with temporary.open("ab") as file:
            file.write(of_student.SerializeToString(deterministic=True))  # two that follow one another are one
    return {
        "graph": str(out),
        "student": str(path),
        "bytes": out.stat().st_size,
        "checked": len(images),
        **properties,
    }
