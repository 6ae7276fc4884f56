"""Where a student that copies attention gets it from when it is evaluated: a store's targets of evaluation views."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from storage.errors import IdentityError
from storage.objects.urls import is_remote
from storage.store.store import Store
from student.alignment.student_spec import student_spec
from student.attention_copy.copier import AttentionCopier
from student.models.attention_copy_hooks import AttentionCopyRecord, Copied, attention_copy_hooks
from student.settings import ATTENTION_COPY, AttentionCopyConfig
from student.targets.evaluation_views import EvaluationTargets, evaluation_targets
from student.targets.stored_target import StoredTarget, stored_target

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from storage.shards.shard import Shard
    from storage.views.policy import Policy
    from student.data.batch import Batch
    from student.models.files import StudentDescription


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
    targets: Sequence[StoredTarget],
    shards: Sequence[Shard],
    view: Policy,
    *,
    permute: int | None = None,
) -> StoredAttention:
    """The stored attention of the images of shards in the evaluation view.

    Args:
        store: that the student learned from.
        copier: of the student.
        targets: the targets that it was trained with.
        shards: labeled shards.
        view: the evaluation view.
        permute: a control: every image gets the attention of another one.

    Raises:
        UserError: as `evaluation_targets`.
    """
    why = (
        f"{ATTENTION_COPY}: a student that copies its teacher's attention needs it of the images that it is evaluated "
        "on, too"
    )
    return StoredAttention(copier, evaluation_targets(store, targets, shards, view, why=why, permute=permute))


def record_of(
    copier: AttentionCopier, store: Store, targets: Sequence[StoredTarget], permute: int | None
) -> AttentionCopyRecord:
    """What a student's file says of its attention copy."""
    return AttentionCopyRecord(
        layers=tuple(copier.hooks.layers),
        heads=copier.hooks.heads,
        settings=AttentionCopyConfig.model_validate(copier.config.model_dump(mode="json")),  # defaults are written too
        store=store.url if is_remote(store.url) else str(Path(store.url).absolute()),
        teacher=targets[0].teacher.id,
        targets=tuple(stored.id for stored in targets),
        graphs=tuple(stored.target.graph_output for stored in targets),
        permute=permute,
    )


def copier_of(
    model: nn.Module, record: AttentionCopyRecord, store: Store
) -> tuple[AttentionCopier, list[StoredTarget]]:
    """The copier of a loaded student, and the stored targets that the student was trained with.

    Args:
        model: the student.
        record: what its file says of its attention copy.
        store: with its targets.

    Raises:
        UserError: the store lacks these targets.
        IdentityError: it has others under their names.
    """
    targets = []
    for id, (graph, output) in zip(record.targets, record.graphs, strict=True):
        targets.append(stored := stored_target(store, id))
        if (stored.target.graph, stored.target.output) != (graph, output):
            raise IdentityError(f"{store.url}: target {id}", "graph", graph, stored.target.graph)
    spec = student_spec(model, attention=False)
    return AttentionCopier(ATTENTION_COPY, record.settings, spec, targets), targets


def attached_to(model: nn.Module) -> EvaluationTargets | None:
    """The stored targets attached to a student; None for one that copies nothing, or the same for all images."""
    hooks = attention_copy_hooks(model)
    stored: EvaluationTargets | None = hooks.source.stored if hooks is not None and hooks.source is not None else None
    return stored


def inject_attention(model: nn.Module, batch: Batch) -> AbstractContextManager[None]:
    """A context in which a student sees a batch with the attention that is attached to it, if any."""
    hooks = attention_copy_hooks(model)
    if hooks is None or hooks.source is None:
        return nullcontext()
    return hooks.attending(hooks.source.copied(batch))


def attach_stored_attention(
    model: nn.Module, about: StudentDescription, store: str | None, shards: Sequence[Shard]
) -> None:
    """Let a loaded student with attention copy be evaluated on shards; other students are left as they are.

    Args:
        model: from `student.models.files.load_student`.
        about: its description.
        store: with its teacher's targets; None: the one that it was trained from.
        shards: labeled shards.

    Raises:
        UserError: as `stored_attention`; no store.
    """
    hooks, record = attention_copy_hooks(model), about.attention_copy
    if hooks is None or hooks.fixed or record is None:
        return
    opened = Store.open(store or record.store)
    copier, targets = copier_of(model, record, opened)
    hooks.source = stored_attention(opened, copier, targets, shards, about.evaluation_policy, permute=record.permute)
