"""Targets as a store gives them, without a store: manifests of networks that there are not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from storage.store.manifests import TargetManifest, TeacherManifest
from student.targets.stored_target import StoredTarget

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

HALF = [0.5, 0.5, 0.5]


def teacher_manifest(identity: Mapping[str, Any] | None = None, **about: Any) -> TeacherManifest:
    """Teacher `t`, a ViT of 12 layers unless something else is said."""
    whole = {"model": "none", "arguments": {}, "weights sha256": "", "input size": 32, "mean": HALF, "std": HALF}
    content = {
        "format": 1,
        "kind": "teacher",
        "id": "t",
        "identity": {**whole, **(identity or {})},
        "weights": "none",
        "classes": None,
        "parameters": 0,
        "network": "vit",
        "layers": 12,
    }
    return TeacherManifest.model_validate({**content, **about})


def stored(
    tap: str,
    shape: Sequence[int],
    layers: Sequence[int] | None = None,
    teacher: Mapping[str, Any] | None = None,
    grid: int | None = None,
    **about: Any,
) -> StoredTarget:
    """Target `t-{tap}` of samples of a shape, of teacher `t`."""
    identity = {"teacher": "t", "bank": "b", "tap": tap, "layers": layers, "grid": grid, "codec": "f32"}
    content = {
        "format": 1,
        "kind": "target",
        "id": f"t-{tap}",
        "identity": identity,
        "teacher": "t",
        "graph": None,
        "output": None,
        "sample_shape": shape,
        "maps": 1,
        "axes": [f"axis{i}" for i in range(len(shape))],
        "parity": None,
        "attention_error": None,
    }
    return StoredTarget(
        target=TargetManifest.model_validate({**content, **about}), teacher=teacher_manifest(**(teacher or {}))
    )
