"""The distiller: the losses of a recipe, aligned with one student and the targets of one store, as one module.

It is what turns a batch of the stream into the number that is minimised: total = Σ weight(epoch) · loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from storage.errors import UserError
from storage.store.store import Store
from student.alignment.report import AlignmentRow
from student.alignment.student_spec import StudentSpec, full, student_spec
from student.alignment.student_taps import ELSEWHERE, StudentTap, StudentTaps
from student.attention_copy import copier
from student.attention_copy.copier import AttentionCopier
from student.data.batch import Batch
from student.losses import cross_entropy, deit
from student.losses.base import LossInputs
from student.losses.parts.queue import Queue
from student.losses.registry import methods
from student.recipe.schema import Recipe
from student.settings import ATTENTION_COPY, WITH_CLASS
from student.targets.requirement import TargetRequirement
from student.targets.select import select_targets
from student.targets.stored_target import StoredTarget, stored_target


def student_taps_of(recipe: Recipe) -> frozenset[StudentTap]:
    """What the recipe's losses read of the student and of the batch, beside stored targets."""
    return frozenset().union(*(methods()[settings.type].reads(settings) for settings in recipe.losses.values()))


def classifies(recipe: Recipe) -> bool:
    """Whether some loss trains a classifier; without one the student is made without it."""
    return bool(student_taps_of(recipe) & ELSEWHERE)


def _shape(recipe: Recipe, model: nn.Module, names: Sequence[str] | None = None) -> StudentSpec:
    """The student's shape; its tokens are looked at only where a loss reads them, so that others train any network."""
    reads, copies = student_taps_of(recipe) - ELSEWHERE, recipe.attention_copy
    attends = bool(reads & {"attention", "values"}) or copies is not None
    values = "values" in reads or (copies is not None and copies.tensors == "v")
    try:
        shape = student_spec(model, names, tokens=bool(reads) or attends, attention=attends, values=values)
    except UserError as error:
        raise UserError(f"{_refused(recipe, attends)}: {error}; {_PLAIN}") from None
    pooled = [name for name, module in methods().items() if getattr(module, "POOLED", False)]
    others = [name for name, loss in recipe.losses.items() if loss.type not in pooled] + [ATTENTION_COPY] * bool(copies)
    if shape.each and others:
        raise UserError(
            f"{others[0]}: {type(model).__name__} pools its patches, so its layers have no common heads and grid; such "
            f"a student learns by {', '.join(pooled)} alone; {_PLAIN}"
        )
    return shape


_PLAIN = f"take a plain ViT, such as --set student.model={WITH_CLASS}"

# What losses read of a student, in words.
_READ: dict[StudentTap, str] = {
    "attention": "attention", "values": "values", "streams": "tokens after its layers", "tokens": "final tokens",
}  # fmt: skip


def _refused(recipe: Recipe, attends: bool) -> str:
    """The first loss that reads what a student does not have, and what that is."""
    wanted: set[StudentTap] = {"attention", "values"} if attends else {"streams", "tokens"}
    for name, settings in recipe.losses.items():
        if found := methods()[settings.type].reads(settings) & wanted:
            return f"{name} reads the student's {' and '.join(_READ[one] for one in sorted(found))}"
    return f"{ATTENTION_COPY} changes the student's attention"


def target_requirements(recipe: Recipe, model: nn.Module) -> list[TargetRequirement]:
    """What the recipe's losses and attention copy read from a store."""
    shape = _shape(recipe, model)
    found = [copier.requirement(recipe.attention_copy) if recipe.attention_copy else None]
    found += [methods()[settings.type].need(name, settings, shape) for name, settings in recipe.losses.items()]
    return [need for need in found if need is not None]


def find_targets(
    store: Store | None, shards: Sequence[str], recipe: Recipe, model: nn.Module
) -> tuple[str | None, dict[str, tuple[StoredTarget, ...]]]:
    """The bank's id, and loss (or `attention_copy`) -> what the store gives it.

    Raises:
        UserError: a loss needs targets and there is no store, or what `select_targets` raises.
    """
    needs = target_requirements(recipe, model)
    if store is None:
        if needs:
            raise UserError(
                f"{needs[0].loss} needs stored targets ({needs[0].words}): give --store DIR, which "
                f"`pipeline precompute --teacher NAME {needs[0].flags} --store DIR …` fills"
            )
        return None, {}
    bank, targets = select_targets(store, shards, needs, recipe.stream.bank)
    return bank, {loss: tuple(stored_target(store, target) for target in several) for loss, several in targets.items()}


class Distiller(nn.Module):
    """Student and losses together: everything that is trained.

    Args:
        recipe: with the losses that are on.
        model: the student.
        given: loss, or `attention_copy`, -> its targets.
        mean: of the student's input.
        std: of the student's input.
        names: of the student's classes, where they are known.

    Raises:
        UserError: a target and the student do not go together.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        given: Mapping[str, Sequence[StoredTarget]],
        mean: Sequence[float],
        std: Sequence[float],
        names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.student = model
        self.settings = recipe.losses
        shape = _shape(recipe, model, names)
        distils = any(isinstance(settings, deit.Settings) for settings in recipe.losses.values())
        terms = {}
        for name, settings in recipe.losses.items():
            if hasattr(nn.ModuleDict, name):
                raise UserError(f"losses.{name}: PyTorch keeps this name for itself; call the loss otherwise")
            if isinstance(settings, cross_entropy.Settings) and settings.heads is None:
                settings = settings.model_copy(update={"heads": "class" if distils else "both"})
            terms[name] = methods()[settings.type].Method(name, settings, shape, given.get(name, ()))
        self.losses = nn.ModuleDict(terms)
        self.queues = _queues(self.losses, recipe.stream.batch_size)
        self.rows: list[AlignmentRow] = [method.row for method in terms.values() if method.row is not None]
        self.copier: AttentionCopier | None = None
        if recipe.attention_copy is not None:
            self.copier = AttentionCopier(recipe.attention_copy, shape, given[ATTENTION_COPY])
            self.copier.copies.attach(model)  # before what is seen: losses see q, k and v as they are used
            self.rows.insert(0, self.copier.row)
        self.targets = {name: tuple(one.id for one in several) for name, several in given.items()}
        reads = student_taps_of(recipe) - ELSEWHERE
        self.seen = StudentTaps(model, reads) if reads else None
        if hasattr(model, "set_distilled_training"):
            model.set_distilled_training(True)  # type: ignore[operator]  # both heads' logits, while it trains
        self.mean, self.std = tuple(mean), tuple(std)
        self.precision: torch.dtype | None = None  # of the student's forward pass; losses are computed in f32
        self.means: dict[str, Tensor] = {}  # a control: target id -> what every image gets in its place
        self.notes: dict[str, Tensor] = {}  # scalars of the last step for people, such as agreement with a teacher

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits `[B, K]` of a batch (features without a classifier), and loss -> value, unweighted scalars."""
        pixels = batch.pixels(self.mean, self.std)
        if self.seen is not None:
            self.seen.clear()
        decoded = {id: self._target(batch, id) for ids in self.targets.values() for id in ids}
        with (
            self._copied(decoded),
            torch.autocast(pixels.device.type, self.precision, enabled=self.precision is not None),
        ):
            output = self.student(pixels)
        logits, distilled = output if isinstance(output, tuple) else (output, None)
        logits, distilled = full(logits), None if distilled is None else full(distilled)
        values: dict[str, Tensor] = {}
        self.notes = {}
        for name, loss in self.losses.items():
            targets = tuple(decoded[id] for id in self.targets.get(name, ()))
            step = LossInputs(
                logits, batch.labels, batch.others, batch.shares, distilled, self.seen, targets, self.notes
            )
            values[name] = loss(step)
        return logits, values

    def _copied(self, decoded: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """What the student attends with in place of its own meanwhile; nothing, or what is fixed already."""
        if self.copier is None or self.copier.copies.fixed:
            return nullcontext()
        copied = self.copier.copied([decoded[id] for id in self.targets[ATTENTION_COPY]])
        return self.copier.copies.given(copied)

    def _target(self, batch: Batch, id: str) -> Tensor:
        if id in self.means:
            return self.means[id].to(batch.images.device).expand(len(batch.labels), *self.means[id].shape)
        return batch.target(id)

    def learned(self) -> dict[str, Tensor]:
        """What the losses learned, such as links and projectors, by name; without queues, which only pass by."""
        passing = [f"{name}." for name, module in self.losses.named_modules() if isinstance(module, Queue)]
        return {name: t for name, t in self.losses.state_dict().items() if not name.startswith(tuple(passing))}

    def total(self, values: Mapping[str, Tensor], epoch: int) -> Tensor:
        """Σ weight(epoch) · loss."""
        return torch.stack([self.settings[name].weight.at(epoch) * value for name, value in values.items()]).sum()


def _queues(losses: nn.ModuleDict, batch: int) -> list[Queue]:
    """The losses' queues. Raises UserError: one that a batch does not go into."""
    found = []
    for name, loss in losses.items():
        for queue in (module for module in loss.modules() if isinstance(module, Queue)):
            if len(queue.entries) < batch:
                raise UserError(
                    f"{name}: a batch of {batch} does not go into a queue of {len(queue.entries)}: "
                    f"--set losses.{name}.queue={batch}"
                )
            found.append(queue)
    return found
