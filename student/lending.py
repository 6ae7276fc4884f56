"""Where a student that copies attention gets it from when it is evaluated: a store's targets of evaluation views."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from storage.banks import bank_policy
from storage.codecs import Codec
from storage.errors import IdentityError, UserError
from storage.markers import Task
from storage.objects import is_remote
from storage.policies import Policy, policy
from storage.records import Record
from storage.shards import cached_index
from storage.store import Store
from storage.weights import READY
from student import commands
from student.align import Given, student_shape
from student.copying import Copied, Copier, copies_of
from student.loss_settings import COPYING, Copying
from student.matching import ranges
from student.model import Description
from student.network import HUB
from student.reader import Source
from student.stream import Batch


@dataclass(frozen=True)
class Lender:
    """Gives batches of evaluated images what they copy.

    Attributes:
        copier: made for the targets that the student was trained with.
        store: with the targets of the evaluation views.
        bank: of these views.
        targets: ids, otherwise as those of the training.
        permute: a control: every image gets what belongs to another one.
    """

    copier: Copier
    store: Store
    bank: str
    targets: tuple[str, ...]
    permute: int | None = None

    def source(self, url: str, shard: str) -> Source:
        """The samples of a shard with what they copy."""
        codecs = {target: Codec.of(self.store.target(target)) for target in self.targets}
        return Source(
            (url,), (shard,), bank_policy(self.store, self.bank), self.store, self.bank, targets=codecs,
            stored=(False,), permute=self.permute,
        )  # fmt: skip

    def copied(self, batch: Batch) -> Copied:
        """What a batch's images copy."""
        return self.copier.to(batch.images.device).copied([batch.target(id) for id in self.targets])


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
        permute: see `Lender`.

    Raises:
        UserError: targets of these images are missing, with the command that makes them; invalid samples.
    """
    wanted = [{**one.target["identity"], "bank": view.bank} for one in given]
    by_identity = [next((id for id, m in store.targets().items() if m["identity"] == one), None) for one in wanted]
    targets = tuple(id for id in by_identity if id is not None)
    done, shards = store.done(), [cached_index(url).id for url in urls]
    lacking = [
        url
        for url, shard in zip(urls, shards, strict=True)
        if len(targets) < len(given) or any(Task("target", id, shard, 0) not in done for id in targets)
    ]
    if lacking:
        others = any(task.kind == "bank" and task.shard in shards and task.id != view.bank for task in done)
        raise UserError(
            f"{COPYING}: a student that copies its teacher's attention needs it of the images that it is "
            f"evaluated on, too, and {store.url} has none of {lacking[0]}"
            f"{f' and {len(lacking) - 1} more' if len(lacking) > 1 else ''} in the view {view.line}; make it:\n"
            f"  {command(store, given, urls, view, new_bank=others)}"
        )
    for url, shard in zip(urls, shards, strict=True):
        if invalid := store.marker(Task("bank", view.bank, shard, 0)).invalid:
            raise UserError(
                f"{url}: {len(invalid)} of its images could not be decoded, and every sample counts in an evaluation; "
                "mend or remove them and pack again"
            )
    return Lender(copier, store, view.bank, targets, permute)


def command(store: Store, given: Sequence[Given], urls: Sequence[str], view: Policy, *, new_bank: bool) -> str:
    """The `pipeline precompute` that makes targets like those given for other shards in another view."""
    teacher, identity = given[0].teacher, given[0].target["identity"]
    about = teacher["identity"]
    ready = about["model"] == READY
    weights = None if ready or teacher["weights"] == HUB else teacher["weights"]
    words = commands.precompute(
        teacher["weights"] if ready else about["model"], teacher["id"], weights, about["arguments"], about["mean"],
        about["std"], about["input size"], store.url, urls,
    )  # fmt: skip
    words += ["--view-policy", view.line, "--view-size", str(view.size), *(["--new-bank"] if new_bank else [])]
    layers = f",layers={ranges(identity['layers'])}" if identity["layers"] else ""
    taps = {one.target["identity"]["tap"]: one.target["identity"].get("tensors", ()) for one in given}
    words += ["--target", f"{','.join(taps)}{layers},codec={identity['codec']}"]
    return shlex.join(
        [*words, *(w for tap, names in taps.items() for name in names for w in ("--tap", f"{tap}={name}"))]
    )


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


def lender_to(model: nn.Module) -> Lender | None:
    """Who lends to a student; None for one that copies nothing, or the same for all images."""
    copies = copies_of(model)
    return copies.lender if copies is not None else None


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
