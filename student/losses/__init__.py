"""Losses: one small module a paper, each with its equation, shapes and reductions.

A module has `Settings` (what a recipe may say of it, with the name of its `method`), `reads(settings)` (what it reads
of student and batch), `need(name, settings, student)` (what it reads from a store, or None) and an `nn.Module`
`Method(name, settings, student, given)` with a `row` for the printed table (or None), called with a `Step`.
`POOLED = True` says that students that pool their patches, such as PiT, learn by it too. What it keeps of a step for
later ones goes into a `student.queues.Queue` of its own. A module that is put here is a method from then on:
docs/adding-a-method.md.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from dataclasses import dataclass, field
from types import ModuleType

from torch import Tensor

from student.seen import Seen


@dataclass(frozen=True)
class Step:
    """What a loss sees of one training step.

    Attributes:
        logits: of the student's class head, `[B, K]`; its pooled features for a student without one.
        labels: int64 `[B]`; −1 where the shards have none.
        others: int64 `[B]`, labels of the images that these were mixed with.
        shares: f32 `[B]`, the others' share.
        distilled: logits of the distillation head, `[B, K]`; None for a student without one.
        seen: what else the losses read of the student in this step; None where none does.
        targets: the loss's own targets, decoded, f32 `[B, …]`; empty where it reads none.
        notes: a loss may leave scalars for people here, such as agreement with the teacher.
    """

    logits: Tensor
    labels: Tensor
    others: Tensor
    shares: Tensor
    distilled: Tensor | None = None
    seen: Seen | None = None
    targets: tuple[Tensor, ...] = ()
    notes: dict[str, Tensor] = field(default_factory=dict)

    @property
    def student(self) -> Seen:
        """What is read of the student beside its logits."""
        assert self.seen is not None
        return self.seen


@functools.cache
def methods() -> dict[str, ModuleType]:
    """Name of a method, as recipes say it -> its module."""
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    return {module.Settings.model_fields["method"].default: module for module in modules if hasattr(module, "Settings")}
