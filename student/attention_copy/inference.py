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
from storage.shards.shard import Shard
from storage.store.store import Store
from storage.views.policy import Policy
from student.alignment.student_spec import student_spec
from student.attention_copy.copier import AttentionCopier
from student.data.batch import Batch
from student.models.attention_copy_hooks import Copied, attention_copy_hooks
from student.models.files import StudentDescription
from student.settings import ATTENTION_COPY, AttentionCopyConfig
from student.targets.evaluation_views import EvaluationTargets, evaluation_targets
from student.targets.stored_target import StoredTarget


@dataclass(frozen=True)
class StoredAttention:
    """Gives batches of evaluated images what they copy.

    Attributes:
        copier: made for the targets that the student was trained with.
        stored: what it copies, of the evaluation views.
    """

    copier: AttentionCopier
    stored: EvaluationTargets

    def copied(self, batch: Batch) -> Copied:
        """What a batch's images copy."""
        return self.copier.to(batch.images.device).copied([batch.target(id) for id in self.stored.targets])


def stored_attention(
    store: Store,
    copier: AttentionCopier,
    given: Sequence[StoredTarget],
    shards: Sequence[Shard],
    view: Policy,
    *,
    permute: int | None = None,
) -> StoredAttention:
    """Who lends to the images of shards in the evaluation view.

    Args:
        store: that the student learned from.
        copier: of the student.
        given: the targets that it was trained with.
        shards: labeled shards.
        view: the evaluation view.
        permute: a control: every image gets what belongs to another one.

    Raises:
        UserError: as `evaluation_targets`.
    """
    why = (
        f"{ATTENTION_COPY}: a student that copies its teacher's attention needs it of the images that it is evaluated "
        "on, too"
    )
    return StoredAttention(copier, evaluation_targets(store, given, shards, view, why=why, permute=permute))


def record_of(
    copier: AttentionCopier,
    settings: AttentionCopyConfig,
    store: Store,
    given: Sequence[StoredTarget],
    permute: int | None,
) -> Record:
    """What has to be known of a student's copies after its training, as plain data."""
    copies = copier.copies
    return {
        "layers": list(copies.layers), "heads": copies.heads,
        "settings": settings.model_dump(mode="json"), "store": _lasting(store.url), "teacher": given[0].teacher.id,
        "targets": [one.id for one in given],
        "graphs": [[*stored.target.graph_output] for stored in given], "permute": permute,
    }  # fmt: skip


def _lasting(url: str) -> str:
    """A store's place as it is said from any folder."""
    return url if is_remote(url) else str(Path(url).absolute())


def copier_of(model: nn.Module, about: StudentDescription, store: Store) -> tuple[AttentionCopier, list[StoredTarget]]:
    """What turns a teacher's targets into what a loaded student copies, and the targets that it was trained with.

    Raises:
        UserError: the store lacks these targets.
        IdentityError: it has others under their names.
    """
    record = about.attention_copy
    assert record is not None
    given = []
    for id, (graph, output) in zip(record["targets"], record["graphs"], strict=True):
        manifest = store.target(id)
        if (manifest.graph, manifest.output) != (graph, output):
            raise IdentityError(f"{store.url}: target {id}", "graph", graph, manifest.graph)
        given.append(StoredTarget(manifest, store.teacher_of(manifest)))
    settings = AttentionCopyConfig.model_validate(record["settings"])
    return AttentionCopier(settings, student_spec(model, attention=False), given), given


def attached_to(model: nn.Module) -> EvaluationTargets | None:
    """What is lent to a student; None for one that copies nothing, or the same for all images."""
    copies = attention_copy_hooks(model)
    stored: EvaluationTargets | None = (
        copies.lender.stored if copies is not None and copies.lender is not None else None
    )
    return stored


def inject_attention(model: nn.Module, batch: Batch) -> AbstractContextManager[None]:
    """What holds while a student looks at a batch: the attention that is lent to it, if any."""
    copies = attention_copy_hooks(model)
    if copies is None or copies.lender is None:
        return nullcontext()
    return copies.given(copies.lender.copied(batch))


def attach_stored_attention(
    model: nn.Module, about: StudentDescription, store: str | None, shards: Sequence[Shard]
) -> None:
    """Let a loaded student that copies attention be evaluated on shards; others are left as they are.

    Args:
        model: from `student.model.load`.
        about: its description.
        store: where its teacher's targets are; None: where they were when it was trained.
        shards: labeled shards.

    Raises:
        UserError: as `stored_attention`; no store.
    """
    copies = attention_copy_hooks(model)
    if copies is None or copies.fixed or about.attention_copy is None:
        return
    opened = Store.open(store or about.attention_copy["store"])
    copier, given = copier_of(model, about, opened)
    copies.lender = stored_attention(
        opened, copier, given, shards, about.evaluation_policy, permute=about.attention_copy["permute"]
    )
