"""Where a student that copies attention gets it from when it is evaluated: a store's targets of evaluation views."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from storage.errors import IdentityError
from storage.objects.json_record import Record
from storage.objects.urls import is_remote
from storage.store.store import Store
from storage.views.policy import Policy, policy
from student.alignment.student_spec import student_shape
from student.attention_copy.copier import Copier
from student.data.batch import Batch
from student.models.attention_copy_hooks import Copied, copies_of
from student.models.files import Description
from student.settings import COPYING, Copying
from student.targets.evaluation_views import EvaluationTargets, evaluation_targets
from student.targets.stored_target import Given


@dataclass(frozen=True)
class Lender:
    """Gives batches of evaluated images what they copy.

    Attributes:
        copier: made for the targets that the student was trained with.
        stored: what it copies, of the evaluation views.
    """

    copier: Copier
    stored: EvaluationTargets

    def copied(self, batch: Batch) -> Copied:
        """What a batch's images copy."""
        return self.copier.to(batch.images.device).copied([batch.target(id) for id in self.stored.targets])


def lender_of(
    store: Store, copier: Copier, given: Sequence[Given], urls: Sequence[str], view: Policy, permute: int | None = None
) -> Lender:
    """Who lends to the images of shards in the evaluation view.

    Args:
        store: that the student learned from.
        copier: of the student.
        given: the targets that it was trained with.
        urls: labelled shards.
        view: the evaluation view.
        permute: a control: every image gets what belongs to another one.

    Raises:
        UserError: as `evaluation_targets`.
    """
    why = (
        f"{COPYING}: a student that copies its teacher's attention needs it of the images that it is evaluated on, too"
    )
    return Lender(copier, evaluation_targets(store, given, urls, view, why, permute))


def record_of(copier: Copier, settings: Copying, store: Store, given: Sequence[Given], permute: int | None) -> Record:
    """What has to be known of a student's copies after its training, as plain data."""
    copies = copier.copies
    return {
        "layers": list(copies.layers), "heads": copies.heads,
        "settings": settings.model_dump(mode="json"), "store": _lasting(store.url), "teacher": given[0].teacher["id"],
        "targets": [one.id for one in given],
        "graphs": [[one.target["graph"], one.target["output"]] for one in given], "permute": permute,
    }  # fmt: skip


def _lasting(url: str) -> str:
    """A store's place as it is said from any folder."""
    return url if is_remote(url) else str(Path(url).absolute())


def copier_of(model: nn.Module, about: Description, store: Store) -> tuple[Copier, list[Given]]:
    """What turns a teacher's targets into what a loaded student copies, and the targets that it was trained with.

    Raises:
        UserError: the store lacks these targets.
        IdentityError: it has others under their names.
    """
    record = about.copying
    assert record is not None
    given = []
    for id, (graph, output) in zip(record["targets"], record["graphs"], strict=True):
        manifest = store.target(id)
        if [manifest["graph"], manifest["output"]] != [graph, output]:
            raise IdentityError(f"{store.url}: target {id}", "graph", graph, manifest["graph"])
        given.append(Given(manifest, store.teacher_of(manifest)))
    settings = Copying.model_validate(record["settings"])
    return Copier(settings, student_shape(model, attention=False), given), given


def lent_to(model: nn.Module) -> EvaluationTargets | None:
    """What is lent to a student; None for one that copies nothing, or the same for all images."""
    copies = copies_of(model)
    stored: EvaluationTargets | None = (
        copies.lender.stored if copies is not None and copies.lender is not None else None
    )
    return stored


def borrowing(model: nn.Module, batch: Batch) -> AbstractContextManager[None]:
    """What holds while a student looks at a batch: the attention that is lent to it, if any."""
    copies = copies_of(model)
    if copies is None or copies.lender is None:
        return nullcontext()
    return copies.given(copies.lender.copied(batch))


def lend(model: nn.Module, about: Description, store: str | None, urls: Sequence[str]) -> None:
    """Let a loaded student that copies attention be evaluated on shards; others are left as they are.

    Args:
        model: from `student.model.load`.
        about: its description.
        store: where its teacher's targets are; None: where they were when it was trained.
        urls: labelled shards.

    Raises:
        UserError: as `lender_of`; no store.
    """
    copies = copies_of(model)
    if copies is None or copies.fixed or about.copying is None:
        return
    opened = Store.open(store or about.copying["store"])
    copier, given = copier_of(model, about, opened)
    copies.lender = lender_of(
        opened, copier, given, urls, policy(about.evaluation, about.img_size), about.copying["permute"]
    )
