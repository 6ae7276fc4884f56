"""Stored targets of evaluation views: what attention copy takes there, or what a student is compared with."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from precompute.taps.target_spec import parse_ranges
from storage.errors import UserError
from storage.objects.state_dict import HUB, ONNX_FILE
from storage.shards.index import cached_index
from storage.store.banks import bank_policy
from storage.store.markers import Task
from storage.store.store import Store
from storage.views.policy import Policy
from student.data.source import Source
from student.targets import hints
from student.targets.stored_target import StoredTarget


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationTargets:
    """What a store keeps of the images that are evaluated.

    Attributes:
        store: with the targets.
        bank: of the evaluation views.
        targets: ids.
        permute: a control: every image gets what belongs to another one.
    """

    store: Store
    bank: str
    targets: tuple[str, ...]
    permute: int | None = None

    def source(self, url: str, shard: str) -> Source:
        """The samples of a shard with these targets."""
        codecs = {target: self.store.target(target).codec for target in self.targets}
        return Source(
            (url,), (shard,), bank_policy(self.store, self.bank), self.store, self.bank, targets=codecs,
            stored=(False,), permute=self.permute,
        )  # fmt: skip


def evaluation_targets(
    store: Store,
    given: Sequence[StoredTarget],
    urls: Sequence[str],
    view: Policy,
    *,
    why: str,
    permute: int | None = None,
) -> EvaluationTargets:
    """Targets like those given, of the images of shards in the evaluation view.

    Args:
        store: where they are.
        given: targets of any bank.
        urls: the shards.
        view: the evaluation view.
        why: they are needed, as an error says it.
        permute: see `EvaluationTargets`.

    Raises:
        UserError: targets of these images are missing, with the command that makes them; invalid samples.
    """
    targets, lacking = kept_of(store, given, urls, view)
    shards = [cached_index(url).id for url in urls]
    if lacking:
        others = any(task.kind == "bank" and task.shard in shards and task.id != view.bank for task in store.done())
        raise UserError(
            f"{why}, and {store.url} has none of {lacking[0]}"
            f"{f' and {len(lacking) - 1} more' if len(lacking) > 1 else ''} in the view {view.line}; make it:\n"
            f"  {command(store, given, urls, view, new_bank=others)}"
        )
    for url, shard in zip(urls, shards, strict=True):
        if invalid := store.marker(Task("bank", view.bank, shard, 0)).bank.invalid:
            raise UserError(
                f"{url}: {len(invalid)} of its images could not be decoded, and every sample counts in an evaluation; "
                "mend or remove them and pack again"
            )
    return EvaluationTargets(store=store, bank=view.bank, targets=targets, permute=permute)


def kept_of(
    store: Store, given: Sequence[StoredTarget], urls: Sequence[str], view: Policy
) -> tuple[tuple[str, ...], list[str]]:
    """Ids of the targets like those given in the evaluation view, and the shards that lack some of them."""
    ids = {manifest.identity.digest: id for id, manifest in reversed(store.targets().items())}  # of two the first
    wanted = [stored.target.identity.model_copy(update={"bank": view.bank}) for stored in given]
    targets = tuple(ids[identity.digest] for identity in wanted if identity.digest in ids)
    done = store.done()
    lacking = [
        url
        for url in urls
        if len(targets) < len(given) or any(Task("target", id, cached_index(url).id, 0) not in done for id in targets)
    ]
    return targets, lacking


def command(store: Store, given: Sequence[StoredTarget], urls: Sequence[str], view: Policy, *, new_bank: bool) -> str:
    """The `pipeline precompute` that makes targets like those given for other shards in another view."""
    teacher = given[0].teacher
    about = teacher.identity
    ready = about.model == ONNX_FILE
    weights = None if ready or teacher.weights == HUB else teacher.weights
    words = hints.precompute(
        teacher.weights if ready else about.model, teacher.id, weights, about.arguments, about.mean,
        about.std, about.input_size, store.url, urls,
    )  # fmt: skip
    words += ["--view-policy", view.line, "--view-size", str(view.size), *(["--new-bank"] if new_bank else [])]
    wishes: dict[str, list[str]] = {}  # layers and codec -> taps
    for identity in (stored.target.identity for stored in given):
        layers = f",layers={parse_ranges(identity.layers)}" if identity.layers else ""
        wishes.setdefault(f"{layers},codec={identity.codec}", []).append(identity.tap)
        for name in identity.tensors:
            words += ["--tap-tensor", f"{identity.tap}={name}"]
    return shlex.join([*words, *(w for rest, taps in wishes.items() for w in ("--target", f"{','.join(taps)}{rest}"))])
