"""Classifiers over sets of shards: the rank of each right class, for each classifier and for all together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from storage.errors import IdentityError, UserError
from storage.shards.classes import class_list, classes_of, require_classes
from storage.shards.shard import require_labels
from student.attention_copy.inference import attached_to, inject_attention
from student.evaluation.batches import evaluation_batches, require_known_labels
from student.evaluation.class_metrics import label_ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from storage.shards.shard import Shard
    from student.evaluation.batches import Answers
    from student.models.files import StudentDescription


@dataclass(frozen=True, slots=True, kw_only=True)
class Classifier:
    """A classifier with what it is called, how it is fed and what its classes are."""

    name: str
    model: nn.Module
    about: StudentDescription


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """What classifiers made of a set.

    Attributes:
        labels: int64 `[N]`, in the set's order of classes.
        ranks: int64 `[M, N]`: how many classes each of M classifiers puts before the right one; the last row is the
            ensemble, where it was asked for.
        names: of the set's classes; None where they are not known.
        num_classes: how many there are to choose from.
    """

    labels: Tensor
    ranks: Tensor
    names: tuple[str, ...] | None
    num_classes: int


@torch.no_grad()
def ensemble_predictions(
    members: Sequence[Classifier],
    shards: Sequence[Shard],
    *,
    ensemble: bool = False,
    device: torch.device | str = "cpu",
    advance: Callable[[int], None] = lambda _samples: None,
) -> Predictions:
    """What each classifier sees in a set, every sample once, on its own evaluation view.

    Where the set lists some of the classes alone (as ImageNet-A and -R do), or in another order, each classifier
    chooses among these. An ensemble's answer is the mean of its members' probabilities (softmax).

    Args:
        members: with models on the device, in eval mode.
        shards: labeled shards.
        ensemble: whether all together are asked too.
        device: where the models are.
        advance: called with the number of samples done.

    Raises:
        UserError: a label that there is no class for, a missing one, an image that cannot be decoded, classifiers of
            other classes than each other's.
        IdentityError: the set has a class that a classifier does not know.
    """
    urls = [shard.url for shard in shards]
    listed = classes_of(urls)
    if listed is None:
        _require_same_classes(members)
    names = tuple(listed or members[0].about.classes or ()) or None
    columns = [_columns(member.about.classes, names, urls) for member in members]
    labels: list[Tensor] = []
    ranks: list[Tensor] = []
    feeds = [(member.about.evaluation_policy, attached_to(member.model)) for member in members]
    readers = {(view, stored): evaluation_batches(shards, view, stored=stored) for view, stored in feeds}
    for parts in zip(*readers.values(), strict=True):
        batches = {feed: part.to(device) for feed, part in zip(readers, parts, strict=True)}
        outputs: list[Tensor] = []
        for member, feed, chosen in zip(members, feeds, columns, strict=True):
            batch = batches[feed]
            with inject_attention(member.model, batch):
                logits = member.model(batch.pixels(member.about.mean, member.about.std)).float()
            outputs.append(logits if chosen is None else logits[:, chosen.to(logits.device)])
            first, num_classes = outputs[0].shape[1], outputs[-1].shape[1]
            require_known_labels(batch, num_classes, shards, member.name)
            if ensemble and num_classes != first:
                counts = f"{member.name} has {num_classes} classes, {members[0].name} {first}"
                raise UserError(f"{counts}; an ensemble is one of the same classes")
        if ensemble:
            outputs.append(reduce(torch.add, (logits.double().softmax(1) for logits in outputs)))
        on_device = batches[feeds[0]].labels
        labels.append(on_device.cpu())
        ranks.append(torch.stack([label_ranks(scores, on_device) for scores in outputs]).cpu())
        advance(len(on_device))
    return Predictions(labels=torch.cat(labels), ranks=torch.cat(ranks, 1), names=names, num_classes=num_classes)


def _require_same_classes(members: Sequence[Classifier]) -> None:
    """IdentityError where members have other classes than the first, whose numbers labels without a list are."""
    first = members[0].about.classes
    for member in members:
        own = member.about.classes
        if first is not None and own is not None and {*first} != {*own}:
            do = "Classifiers of one ensemble or table have the same classes; pack the shards with their classes.json."
            raise IdentityError(member.name, "classes", class_list(first), class_list(own), do)


def predictions_of(
    answers: Answers,
    shards: Sequence[Shard],
    classes: tuple[str, ...] | None,
    *,
    advance: Callable[[int], None] = lambda _samples: None,
) -> Predictions:
    """What one network, or a store, says of a set; classes are chosen as in `ensemble_predictions`.

    Args:
        answers: logits `[B, K]` with labels, of each sample of the shards once.
        shards: labeled shards.
        classes: names of the K classes; None where they are not known, and the labels are their numbers.
        advance: called with the number of samples done.

    Raises:
        UserError: a label that there is no class for.
        IdentityError: the set has a class that is not among these.
    """
    urls = [shard.url for shard in shards]
    names = tuple(classes_of(urls) or classes or ()) or None
    chosen, num_classes = _columns(classes, names, urls), 0
    labels, ranks = [], []
    for logits, known in answers:
        scores = logits.float() if chosen is None else logits.float()[:, chosen.to(logits.device)]
        if not num_classes:
            num_classes = scores.shape[1]
            for shard in shards:
                require_labels(shard, num_classes)
        labels.append(known.cpu())
        ranks.append(label_ranks(scores, known.to(scores.device)).cpu())
        advance(len(known))
    return Predictions(labels=torch.cat(labels), ranks=torch.cat(ranks)[None], names=names, num_classes=num_classes)


def _columns(own: tuple[str, ...] | None, names: tuple[str, ...] | None, urls: Sequence[str]) -> Tensor | None:
    """Which of a classifier's outputs are the classes with these names, in their order; None for all as they are."""
    if own is None or names is None or names == own:
        return None
    if not {*names} <= {*own}:
        require_classes(urls, own)  # says what differs
    numbers = {name: i for i, name in enumerate(own)}
    return torch.tensor([numbers[name] for name in names])
