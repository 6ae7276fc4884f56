"""A lesson: the losses of a recipe, aligned with one student and the targets of one store, as one module.

It is what turns a batch of the stream into the number that is minimised: total = Σ weight(epoch) · loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

from precompute.taps import AttentionTaps
from storage.errors import UserError
from storage.records import Record
from storage.store import Store
from student.align import Row, Shape, student_shape
from student.choose import Need, choose
from student.config import Recipe
from student.losses import Step, aal, crossentropy
from student.stream import Batch

METHODS: dict[str, ModuleType] = {"crossentropy": crossentropy, "aal": aal}


def needs_of(recipe: Recipe, model: nn.Module) -> list[Need]:
    """What the recipe's losses read from a store."""
    shape = _shape(recipe, model)
    found = [METHODS[settings.method].need(name, settings, shape) for name, settings in recipe.losses.items()]
    return [need for need in found if need is not None]


def _shape(recipe: Recipe, model: nn.Module) -> Shape | None:
    """The student's shape; None where no loss needs it, so that cross-entropy trains any network."""
    return student_shape(model) if {s.method for s in recipe.losses.values()} - {"crossentropy"} else None


class Lesson(nn.Module):
    """Student and losses together: everything that is trained.

    Args:
        recipe: with the losses that are on.
        model: the student.
        manifests: loss -> manifest of its target.
        mean: of the student's input.
        std: of the student's input.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        manifests: Mapping[str, Record],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.student = model
        self.settings = recipe.losses
        shape = _shape(recipe, model)
        self.rows: list[Row] = []
        methods = {}
        for name, settings in self.settings.items():
            method = METHODS[settings.method]
            row = method.align(name, settings, shape, manifests.get(name))
            self.rows += [row] if row else []
            methods[name] = method.Method(settings, shape, manifests.get(name))
        self.losses = nn.ModuleDict(methods)
        self.targets = {name: str(manifest["id"]) for name, manifest in manifests.items()}
        self.attention = AttentionTaps(model) if shape is not None else None
        self.mean, self.std = tuple(mean), tuple(std)
        self.precision: torch.dtype | None = None  # of the student's forward pass; losses are computed in f32
        self.notes: dict[str, Tensor] = {}  # scalars of the last step for people, such as agreement with a teacher

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits `[B, K]` of a batch, and loss -> value, unweighted scalars."""
        logits: Tensor = self.student(batch.pixels(self.mean, self.std))
        values = {}
        for name, loss in self.losses.items():
            target = batch.target(self.targets[name]) if name in self.targets else None
            values[name] = loss(Step(logits, batch.labels, batch.others, batch.shares, self.attention, target))
        return logits, values

    def total(self, values: Mapping[str, Tensor], epoch: int) -> Tensor:
        """Σ weight(epoch) · loss."""
        return torch.stack([self.settings[name].weight.at(epoch) * value for name, value in values.items()]).sum()


def find_targets(
    store: Store | None, shards: Sequence[str], recipe: Recipe, model: nn.Module
) -> tuple[str | None, dict[str, Record]]:
    """The bank's id, and loss -> manifest of its target.

    Raises:
        UserError: a loss needs targets and there is no store, or what `choose` raises.
    """
    needs = needs_of(recipe, model)
    if store is None:
        if needs:
            raise UserError(f"{needs[0].loss} needs stored targets ({needs[0].tap}): give --store DIR")
        return None, {}
    bank, targets = choose(store, shards, needs, recipe.stream.bank)
    return bank, {loss: store.target(target) for loss, target in targets.items()}
