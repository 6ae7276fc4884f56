"""Stored targets of evaluation views: what attention copy takes there, or what a student is compared with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from precompute.taps.target_spec import parse_ranges
from storage.errors import UserError
from storage.objects.network_names import BUILT, bare
from storage.objects.state_dict import HUB, ONNX_FILE
from storage.store.banks import bank_policy
from storage.store.markers import Task
from student.data.source import Source
from student.targets import hints

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from storage.shards.shard import Shard
    from storage.store.codecs import Codec
    from storage.store.store import Store
    from storage.views.policy import Policy
    from student.targets.stored_target import StoredTarget


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationTargets:
    """What a store keeps of the images that are evaluated.

    Attributes:
        store: with the targets.
        policy: of the evaluation views.
        codecs: target id -> codec.
        permute: a control: every image gets what belongs to another one.
    """

    store: Store
    policy: Policy
    codecs: Mapping[str, Codec] = field(hash=False)
    permute: int | None = None

    @property
    def targets(self) -> tuple[str, ...]:
        """Ids of the targets."""
        return tuple(self.codecs)

    def source(self, shard: Shard) -> Source:
        """The samples of a shard with these targets."""
        policy, permute = self.policy, self.permute
        return Source(
            shards=(shard,), policy=policy, store=self.store, bank=policy.bank, targets=self.codecs, permute=permute
        )


def evaluation_targets(
    store: Store,
    stored: Sequence[StoredTarget],
    shards: Sequence[Shard],
    view: Policy,
    *,
    why: str,
    permute: int | None = None,
) -> EvaluationTargets:
    """Targets like those given, of the images of shards in the evaluation view.

    Args:
        store: where they are.
        stored: targets of any bank.
        shards: that are evaluated.
        view: the evaluation view.
        why: they are needed, as an error says it.
        permute: see `EvaluationTargets`.

    Raises:
        UserError: targets of these images are missing, with the command that makes them; invalid samples.
    """
    targets, lacking = kept_of(store, stored, shards, view)
    if lacking:
        ids = {shard.id for shard in shards}
        other_bank = any(task.kind == "bank" and task.shard in ids and task.id != view.bank for task in store.done())
        raise UserError(
            f"{why}, and {store.url} has none of {lacking[0]}"
            f"{f' and {len(lacking) - 1} more' if len(lacking) > 1 else ''} in the view {view.line}",
            hint=f"Make it:\n  {command(store, stored, shards, view, new_bank=other_bank)}",
        )
    for shard in shards:
        if invalid := store.marker(Task("bank", view.bank, shard.id, 0)).bank.invalid:
            raise UserError(
                f"{shard.url}: {len(invalid)} of its images could not be decoded, and every sample counts in an "
                "evaluation",
                hint="Fix or remove them and pack again.",
            )
    codecs = {target: store.target(target).codec for target in targets}
    return EvaluationTargets(store=store, policy=bank_policy(store, view.bank), codecs=codecs, permute=permute)


def kept_of(
    store: Store, stored_targets: Sequence[StoredTarget], shards: Sequence[Shard], view: Policy
) -> tuple[tuple[str, ...], list[str]]:
    """Ids of the targets like those given in the evaluation view, and URLs of the shards that lack some of them."""
    ids = {manifest.identity.digest: id for id, manifest in reversed(store.targets().items())}  # of two the first
    digests = [stored.target.identity.model_copy(update={"bank": view.bank}).digest for stored in stored_targets]
    targets = tuple(ids[digest] for digest in digests if digest in ids)
    done = store.done()
    lacking = [
        shard.url
        for shard in shards
        if len(targets) < len(stored_targets) or any(Task("target", id, shard.id, 0) not in done for id in targets)
    ]
    return targets, lacking


def command(
    store: Store, stored_targets: Sequence[StoredTarget], shards: Sequence[Shard], view: Policy, *, new_bank: bool
) -> str:
    """The `precompute` command that makes targets like the stored ones for other shards in another view."""
    teacher = stored_targets[0].teacher
    about, identities = teacher.identity, [stored.target.identity for stored in stored_targets]
    is_onnx = about.model == ONNX_FILE
    taps: dict[str, list[str]] = {}  # by layers and codec
    for identity in identities:
        layers = f",layers={parse_ranges(identity.layers)}" if identity.layers else ""
        taps.setdefault(f"{layers},codec={identity.codec}", []).append(identity.tap)
    return hints.precompute(
        teacher=teacher.weights if is_onnx else bare(about.model),
        weights=None if is_onnx or teacher.weights in (HUB, BUILT) else teacher.weights,
        teacher_name=teacher.id,
        arguments=about.arguments,
        mean=about.mean,
        std=about.std,
        input_size=about.input_size,
        store=store.url,
        shards=[shard.url for shard in shards],
        view_policy=view.line,
        view_size=view.size,
        new_bank=new_bank or None,
        tap_tensor=[f"{identity.tap}={name}" for identity in identities for name in identity.tensors],
        target=[f"{','.join(names)}{rest}" for rest, names in taps.items()],
    )
