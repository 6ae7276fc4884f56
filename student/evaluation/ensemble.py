"""Classifiers over sets of shards: the rank of each right class, for each classifier and for all together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from storage.errors import IdentityError, UserError
from storage.shards.classes import classes_of, require_classes
from student.attention_copy.inference import attached_to, inject_attention
from student.evaluation.batches import evaluation_batches
from student.evaluation.class_metrics import label_ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from storage.shards.shard import Shard
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
    batch_size: int = 256,
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
        batch_size: about how many samples at a time.
        advance: called with the number of samples done.

    Raises:
        UserError: a label that there is no class for, a missing one, an image that cannot be decoded, classifiers of
            other classes than each other's.
        IdentityError: the set has a class that a classifier does not know.
    """
    urls = [shard.url for shard in shards]
    names = classes_of(urls)
    columns = [_columns(member, names, members[0], urls) for member in members]
    labels: list[Tensor] = []
    ranks: list[Tensor] = []
    num_classes = 0
    views = [member.about.evaluation_policy for member in members]
    feeds = [(view, attached_to(member.model)) for view, member in zip(views, members, strict=True)]
    readers = {feed: evaluation_batches(shards, feed[0], batch_size, stored=feed[1]) for feed in feeds}
    for parts in zip(*readers.values(), strict=True):
        batches = {feed: part.to(device) for feed, part in zip(readers, parts, strict=True)}
        batch_labels = parts[0].labels.to(device)
        total: Tensor | None = None
        batch_ranks = []
        for member, feed, chosen in zip(members, feeds, columns, strict=True):
            with inject_attention(member.model, batches[feed]):
                logits = member.model(batches[feed].pixels(member.about.mean, member.about.std)).float()
            logits = logits if chosen is None else logits[:, chosen.to(logits.device)]
            num_classes = logits.shape[1]
            if int(batch_labels.max()) >= num_classes:
                url = urls[int(parts[0].ids[int(batch_labels.argmax()), 0])]
                raise UserError(
                    f"{url}: there is a label {int(batch_labels.max())}, {member.name} has classes 0 to "
                    f"{num_classes - 1}"
                )
            batch_ranks.append(label_ranks(logits, batch_labels))
            if ensemble:
                probabilities = logits.double().softmax(1)
                if total is not None and total.shape != probabilities.shape:
                    raise UserError(
                        f"{member.name} has {num_classes} classes, {members[0].name} {total.shape[1]}; an ensemble "
                        "is one of the same classes"
                    )
                total = probabilities if total is None else total + probabilities
        if total is not None:
            batch_ranks.append(label_ranks(total, batch_labels))
        labels.append(batch_labels.cpu())
        ranks.append(torch.stack(batch_ranks).cpu())
        advance(len(batch_labels))
    listed = names or members[0].about.classes
    return Predictions(
        labels=torch.cat(labels),
        ranks=torch.cat(ranks, 1),
        names=tuple(listed) if listed else None,
        num_classes=num_classes,
    )


def _columns(member: Classifier, names: Sequence[str] | None, first: Classifier, urls: Sequence[str]) -> Tensor | None:
    """Which of a member's outputs are the set's classes, in its order; None for all as they are."""
    own = member.about.classes
    if own is None:
        return None
    if names is None:  # labels are the first one's
        if first.about.classes in (None, own):
            return None
        if set(first.about.classes or ()) != set(own):
            do = "Classifiers of one ensemble or table have the same classes; pack the shards with their classes.json."
            raise IdentityError(member.name, "classes", _few(first.about.classes or ()), _few(own), do)
        names = first.about.classes
    assert names is not None
    if not set(names) <= set(own):
        require_classes(urls, own)  # says what differs
    numbers = {name: i for i, name in enumerate(own)}
    chosen = [numbers[name] for name in names]
    return None if chosen == list(range(len(own))) else torch.tensor(chosen)


def _few(names: Sequence[str]) -> str:
    return f"{len(names)} ({', '.join(names[:4])}{', …' if len(names) > 4 else ''})"
