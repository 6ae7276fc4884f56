"""The distiller: the losses of a recipe, aligned with one student and the targets of one store, as one module.

It turns a batch of the stream into the number that is minimized: total = Σ weight(epoch) · loss.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from precompute.taps import full
from storage.errors import UserError, setting
from student.alignment.student_spec import StudentSpec, student_spec
from student.alignment.student_taps import ELSEWHERE, OF_ANY, StudentTap, StudentTaps
from student.attention_copy.copier import AttentionCopier
from student.losses.base import Loss, LossInputs
from student.losses.cross_entropy import CrossEntropyConfig
from student.losses.deit import DeiTConfig
from student.losses.parts.queue import Queue
from student.losses.registry import LOSSES
from student.settings import ATTENTION_COPY, WITH_CLASS
from student.targets.requirement import TargetRequirement
from student.targets.select import select_targets
from student.targets.stored_target import StoredTarget, stored_target

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from storage.store.store import Store
    from student.alignment.report import AlignmentRow
    from student.data.batch import Batch
    from student.recipe.schema import Recipe


def student_taps_of(recipe: Recipe) -> frozenset[StudentTap]:
    """What the recipe's losses read of the student and of the batch, beside stored targets."""
    return frozenset().union(*(LOSSES[config.type].student_taps(config) for config in recipe.losses.values()))


def classifies(recipe: Recipe) -> bool:
    """Whether some loss trains a classifier; without one the student is made without it."""
    return bool(student_taps_of(recipe) & ELSEWHERE)


def _student_spec(recipe: Recipe, model: nn.Module, class_names: Sequence[str] | None = None) -> StudentSpec:
    """The student's shape; its tokens are read only where a loss needs them, so that others train any network."""
    taps, attention_copy = student_taps_of(recipe) - ELSEWHERE, recipe.attention_copy
    if attention_copy is not None:
        taps |= AttentionCopier.student_taps(attention_copy)
    attention = bool(taps & {"attention", "values"})
    reads_tokens = [LOSSES[c.type] for c in recipe.losses.values() if LOSSES[c.type].student_taps(c) - OF_ANY]
    try:
        spec = student_spec(
            model,
            class_names,
            tokens=bool(taps - OF_ANY),
            attention=attention,
            maps=recipe.attention_copy is None and all(loss.reads_maps for loss in reads_tokens),
            embedding="embedding" in taps,
            size=recipe.student.img_size,
        )
    except UserError as error:
        of_any = ", ".join(name for name, loss in LOSSES.items() if loss.reads_maps or _of_any(loss))
        hint = f"{_PLAIN}\n  Or take losses that any network learns by: {of_any}"
        raise UserError(f"{_refused(recipe, attention)}: {error.message}", hint=hint) from None
    pooling = [name for name, loss in LOSSES.items() if loss.supports_pooling or _of_any(loss)]
    not_pooling = [name for name, config in recipe.losses.items() if config.type not in pooling]
    not_pooling += [ATTENTION_COPY] if attention_copy is not None else []
    if spec.each and not_pooling:
        pools = f"{type(model).__name__} pools its patches, so its layers have no common heads and grid"
        learns = f"such a student learns by {', '.join(pooling)} alone"
        raise UserError(f"{not_pooling[0]}: {pools}; {learns}", hint=_PLAIN)
    return spec


def _of_any(loss: type[Loss[Any]]) -> bool:
    """Whether a loss, as it is by default, reads nothing but what any network has."""
    return loss.student_taps(loss.Config()) <= OF_ANY


_PLAIN = f"Take a plain ViT, such as {setting('student.model', WITH_CLASS)}"

# What losses read of a student, in words.
_READ: dict[StudentTap, str] = {
    "attention": "attention",
    "values": "values",
    "streams": "tokens after its layers",
    "tokens": "final tokens",
    "embedding": "embedding",
}


def _refused(recipe: Recipe, attention: bool) -> str:
    """The first loss that reads what a student does not have, and what that is."""
    missing: set[StudentTap] = {"attention", "values"} if attention else {"streams", "tokens", "embedding"}
    for name, config in recipe.losses.items():
        if taps := LOSSES[config.type].student_taps(config) & missing:
            return f"{name} reads the student's {' and '.join(_READ[tap] for tap in sorted(taps))}"
    return f"{ATTENTION_COPY} changes the student's attention"


def find_targets(
    store: Store | None, shards: Sequence[str], recipe: Recipe, model: nn.Module
) -> tuple[str | None, dict[str, tuple[StoredTarget, ...]]]:
    """The bank's id, and loss (or `attention_copy`) -> its stored targets.

    Raises:
        UserError: a loss needs targets and there is no store, or what `select_targets` raises.
    """
    spec, requirements = _student_spec(recipe, model), list[TargetRequirement]()
    if recipe.attention_copy is not None:
        requirements.append(AttentionCopier.requirement(ATTENTION_COPY, recipe.attention_copy))
    for name, config in recipe.losses.items():
        if (requirement := LOSSES[config.type].requirement(name, config, spec)) is not None:
            requirements.append(requirement)
    if store is None and requirements:
        first = requirements[0]
        hint = f"Give {setting('store', 'DIR')}, which {first.precompute(store='DIR')} fills."
        raise UserError(f"{first.loss} needs stored targets ({first.words})", hint=hint)
    if store is None:
        return None, {}
    bank, ids = select_targets(store, shards, requirements, recipe.stream.bank)
    return bank, {loss: tuple(stored_target(store, id) for id in its_ids) for loss, its_ids in ids.items()}


class Distiller(nn.Module):
    """Student and losses together: everything that is trained.

    Args:
        recipe: with the losses that are on.
        model: the student.
        targets: loss, or `attention_copy`, -> its stored targets.
        mean: of the student's input.
        std: of the student's input.
        class_names: of the student's classes, where they are known.

    Attributes:
        terms: the losses by name; `losses` is the same as a module.
        targets: loss, or `attention_copy`, -> its stored targets; `target_ids` the same with their ids.
        precision: of the student's forward pass; None: float32. Losses are computed in float32.
        means: a control: target id -> what every image gets in its place.
        metrics: scalars of the last step that losses log, such as agreement with a teacher.

    Raises:
        UserError: a target and the student do not go together.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        targets: Mapping[str, Sequence[StoredTarget]],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.student, self.configs = model, recipe.losses
        spec = _student_spec(recipe, model, class_names)
        self.terms: dict[str, Loss[Any]] = {}
        both_heads = not any(isinstance(config, DeiTConfig) for config in recipe.losses.values())
        for name, config in recipe.losses.items():
            if hasattr(nn.ModuleDict, name):
                raise UserError(f"losses.{name}: PyTorch keeps this name for itself; call the loss otherwise")
            if isinstance(config, CrossEntropyConfig) and config.heads is None:
                config = config.model_copy(update={"heads": "both" if both_heads else "class"})
            self.terms[name] = LOSSES[config.type](name, config, spec, targets.get(name, ()))
        self.losses = nn.ModuleDict(self.terms)
        self.queues = _queues(self.terms, recipe.stream.batch_size)
        self.rows: list[AlignmentRow] = [loss.row for loss in self.terms.values() if loss.row is not None]
        self.copier: AttentionCopier | None = None
        if recipe.attention_copy is not None:
            self.copier = AttentionCopier(ATTENTION_COPY, recipe.attention_copy, spec, targets[ATTENTION_COPY])
            self.copier.hooks.attach(model)  # before the taps: losses see q, k and v as they are used
            self.rows.insert(0, self.copier.row)
        self.targets = targets
        self.target_ids = {name: tuple(stored.id for stored in its_targets) for name, its_targets in targets.items()}
        self.student_taps = StudentTaps(model, student_taps_of(recipe) - ELSEWHERE, spec.attention, spec.stages)
        self._two_heads = hasattr(model, "set_distilled_training")
        if self._two_heads:
            model.set_distilled_training(True)  # type: ignore[operator]  # both heads' logits, while it trains
        self.mean, self.std = tuple(mean), tuple(std)
        # On the device, and no buffers: ranks would send them to each other in every step.
        self._mean, self._std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        self.precision: torch.dtype | None = None
        self.means: dict[str, Tensor] = {}
        self.metrics: dict[str, Tensor] = {}

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits `[B, K]` of a batch (features without a classifier), and loss -> value, unweighted scalars."""
        pixels = self._pixels(batch)
        self.student_taps.clear()
        decoded = {id: self._target(batch, id) for ids in self.target_ids.values() for id in ids}
        with (
            self._attention_copy(decoded),
            self.student_taps,
            torch.autocast(pixels.device.type, self.precision, enabled=self.precision is not None),
        ):
            output = self.student(pixels)
        if isinstance(output, tuple) and not self._two_heads:
            output = output[0]  # the others are of auxiliary heads
        logits, distillation_logits = output if isinstance(output, tuple) else (output, None)
        logits = full(logits)
        self.metrics = {}
        inputs = LossInputs(
            logits=logits,
            distillation_logits=None if distillation_logits is None else full(distillation_logits),
            student_taps=self.student_taps,
            labels=batch.labels,
            mix_labels=batch.mix_labels,
            mix_weights=batch.mix_weights,
            metrics=self.metrics,
        )
        targets = {name: tuple(decoded[id] for id in self.target_ids.get(name, ())) for name in self.terms}
        return logits, {name: loss(replace(inputs, targets=targets[name])) for name, loss in self.terms.items()}

    def _attention_copy(self, decoded: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """A context in which the student attends with what it copies, unless that is nothing or fixed."""
        if self.copier is None or self.copier.hooks.fixed:
            return nullcontext()
        copied = self.copier.copied([decoded[id] for id in self.target_ids[ATTENTION_COPY]])
        return self.copier.hooks.attending(copied)

    def _pixels(self, batch: Batch) -> Tensor:
        """Normalized images f32 `[B, 3, S, S]`, by constants that were brought to the device once."""
        device = batch.images.device
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        return batch.pixels(self._mean, self._std)

    def _target(self, batch: Batch, id: str) -> Tensor:
        if id in self.means:
            return self.means[id].to(batch.images.device).expand(len(batch.labels), *self.means[id].shape)
        return batch.target(id)

    def learned(self) -> dict[str, Tensor]:
        """What the losses learned, such as links and projectors, by name; without the content of queues."""
        queues = tuple(f"{name}." for name, module in self.losses.named_modules() if isinstance(module, Queue))
        return {name: tensor for name, tensor in self.losses.state_dict().items() if not name.startswith(queues)}

    def total(self, values: Mapping[str, Tensor], epoch: int) -> Tensor:
        """Σ weight(epoch) · loss."""
        return torch.stack([self.configs[name].weight.at(epoch) * value for name, value in values.items()]).sum()


def _queues(losses: Mapping[str, nn.Module], batch: int) -> list[Queue]:
    """The losses' queues. Raises UserError: one that holds less than a batch."""
    queues = []
    for name, loss in losses.items():
        for queue in (module for module in loss.modules() if isinstance(module, Queue)):
            if len(queue.entries) < batch:
                message = f"{name}: a batch of {batch} does not fit into a queue of {len(queue.entries)}"
                raise UserError(message, hint=f"Give a longer queue: {setting(f'losses.{name}.queue', batch)}")
            queues.append(queue)
    return queues
