"""Teachers as `pipeline evaluate` measures them: what a store holds of the images, else what the network says now."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from pipeline.console import Console
from pipeline.evaluation.common import LIVE, EvaluatedTeacher
from precompute.export.pytorch import live_teacher, read_taps
from precompute.taps import Tap
from precompute.teachers.onnx_file import is_onnx_file
from precompute.teachers.teacher import Teacher, find_teacher, resolve
from storage.errors import DamageError, IdentityError, UserError, call, setting
from storage.objects.network_names import BUILT, is_own
from storage.objects.state_dict import HUB, ONNX_FILE
from storage.shards.classes import classes_of
from storage.store.banks import policy_of
from storage.store.codecs import CODECS
from storage.store.store import Store
from storage.unicode_names import all_normalized
from storage.views.policy import NAMED, Policy, policy
from student.evaluation.batches import evaluation_batches, stored_answers
from student.evaluation.frozen.features import Reading, feature_text
from student.targets.evaluation_views import evaluation_targets, kept_of
from student.targets.stored_target import StoredTarget

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import numpy as np
    from torch import Tensor

    from precompute.taps import TappedTeacher
    from storage.shards.shard import Shard
    from storage.store.manifests import TargetManifest, TeacherManifest
    from student.evaluation.batches import Answers

USUAL = NAMED["eval"]  # the view of a live teacher where nothing is said
BATCH = 64  # images that a live teacher sees together
WORDS = {"embedding": "what the classifier reads (embedding)", "class_token": "class token after the final norm"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherQuery:
    """Which teacher is measured, and how.

    Attributes:
        name: in the store, of the project file, a short name or timm's.
        model: what `find_teacher` knows it by, where the store has no teacher of this name.
        settings: arguments of `find_teacher`; what is not said is None or empty.
        said: whether flags say something of it: the store's teacher then counts only where it is the same.
        store: where its targets may be.
        store_may_be_missing: a project file names one that is still to be made.
        view_policy: line of the evaluation view; None for any without chance that is stored, else the usual one.
        view_size: side of the view; None likewise.
        live: run the network whatever is stored.
    """

    name: str
    model: str
    settings: Mapping[str, Any]
    said: bool
    store: str | None
    store_may_be_missing: bool
    view_policy: str | None
    view_size: int | None
    live: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherAnswers:
    """What a teacher says of labeled images.

    Attributes:
        evaluated: which teacher, and where its answers are from.
        classes: names of its classes; None where they are not known.
        text: in words, what is read.
        width: numbers of a sample.
        read: shards and, of each, indices of samples (None for all) -> answers with labels.
    """

    evaluated: EvaluatedTeacher
    classes: tuple[str, ...] | None
    text: str
    width: int
    read: Callable[[Sequence[Shard], Sequence[np.ndarray] | None], Answers]

    def batches(self, shards: Sequence[Shard], chosen: Sequence[np.ndarray] | None = None) -> Answers:
        """The answers of labeled shards, each sample once, in order."""
        return self.read(shards, chosen)


def open_teacher(
    query: TeacherQuery, taps: Sequence[str], shards: Sequence[Shard], device: torch.device, read: Reading | None = None
) -> TeacherAnswers:
    """A teacher's answers: of the first of `taps` that a store holds of all shards, else live.

    Args:
        query: which teacher.
        taps: that serve, the best first; a live teacher gives the first.
        shards: all that will be read.
        device: where a live teacher runs.
        read: what is read of a live network in place of the tap.

    Raises:
        UserError: no such teacher, a tap that it does not have, several views that fit, a view with chance, or a ready
            graph of which nothing is stored.
    """
    if query.view_policy is not None:
        _require_without_chance(policy(query.view_policy, query.view_size or 224))
    store = _store(query)
    if store is None and is_onnx_file(query.model):
        raise _ready(query, query.model)
    recorded = store.teachers().get(query.name) if store else None
    teacher = _find(query, recorded, store) if query.said or recorded is None else None
    if store and teacher is not None:
        recorded = next((known for known in store.teachers().values() if known.identity.digest == teacher.id), None)
    why = "--live" if query.live else "no store is given"
    if store and not query.live:
        stored = None if recorded is None else _stored(query, store, recorded, taps, shards)
        if stored is not None:
            return stored
        of_it = f"{' or '.join(taps)} of all these images in a view without chance" if recorded else "this teacher"
        why = f"{store.url} does not have {of_it}"
    if recorded and recorded.identity.model == ONNX_FILE:
        raise _ready(query, recorded.weights)
    return _live(teacher or _find(query, recorded, store), query, Tap(taps[0]), device, read, why)


def require_known_classes(answers: TeacherAnswers, shards: Sequence[Shard], same_classes: bool) -> None:
    """Contract 10: a teacher's logits meet only labels of classes that are known to be its own.

    Args:
        answers: logits.
        shards: labeled ones.
        same_classes: both lists are the same, where one is not known.

    Raises:
        IdentityError: another number of classes.
        UserError: a list of names is not known, and `same_classes` is not set.
    """
    listed, own = classes_of([shard.url for shard in shards]), answers.classes
    where, words = f"teacher {answers.evaluated.teacher}", ("it has", "the shards")
    if own and len(own) != answers.width:
        raise IdentityError(where, "number of classes", answers.width, len(own), words=("it has", "its file lists"))
    if own and listed:
        return  # matched by name
    if not same_classes:
        unknown = "the shards' classes are (no classes.json)" if own else "its classes are"
        raise UserError(
            f"{where}: {unknown} not known by name, so nobody can tell whether class 3 is class 3",
            hint=f"If you know that both lists are the same, in the same order, give {setting('same_classes', True)}",
        )
    if listed and len(listed) != answers.width:
        raise IdentityError(where, "number of classes", answers.width, len(listed), words=words)


def _store(query: TeacherQuery) -> Store | None:
    if query.store is None:
        return None
    try:
        return Store.open(query.store)
    except UserError as error:
        if query.store_may_be_missing and not isinstance(error, DamageError):
            return None
        raise


def _find(query: TeacherQuery, recorded: TeacherManifest | None, store: Store | None) -> Teacher:
    """The teacher that flags and project file say; what they do not say is as the store records it.

    Raises:
        UserError: as `find_teacher`.
        IdentityError: the recorded teacher, and its file of weights is another one now.
    """
    model, settings = query.model, dict(query.settings)
    if is_own(model):
        resolve(model)  # the user names it, so that its code may run
    if recorded is not None:
        identity = recorded.identity
        model = recorded.weights if identity.model == ONNX_FILE else identity.model
        settings["arguments"] = {**identity.arguments, **settings["arguments"]}
        if settings["weights"] is None:
            without_file = recorded.weights in (HUB, BUILT) or is_onnx_file(model)
            settings["weights"] = None if without_file else recorded.weights
            settings["weights_key"] = settings["weights_key"] or identity.weights_key
        for name in ("input_size", "mean", "std"):
            settings[name] = settings[name] or getattr(identity, name)
        settings["prefix"] = identity.prefix if settings["prefix"] is None else settings["prefix"]
        settings["tap_modules"] = settings["tap_modules"] or identity.tap_modules
    try:
        teacher = find_teacher(model, **settings, say=Console().say)
    except UserError as error:
        if store is None or recorded is not None or query.said:
            raise
        names = ", ".join(store.teachers()) or "none"
        raise UserError(str(error), hint=f"{store.url} has teachers: {names}.") from None
    if recorded is not None and not query.said and teacher.id != recorded.identity.digest:
        expected, found = recorded.identity.weights_sha256, teacher.digest
        hint = f"The store {store.url if store else ''} records the teacher {recorded.id}."
        raise IdentityError(
            setting("weights", teacher.weights or recorded.weights), "weights sha256", expected, found, hint
        )
    return replace(teacher, name=query.name)


def _ready(query: TeacherQuery, graph: str) -> UserError:
    """The error that a ready graph does not run here."""
    line = policy(query.view_policy or USUAL, query.view_size or 224).line
    return UserError(
        f"{query.name} is a ready graph; it is measured by what a store keeps of these images in a view without chance",
        hint=f"Store it: {call('precompute', '…', teacher=graph, view_policy=line, view_size=query.view_size)}",
    )


def _stored(
    query: TeacherQuery, store: Store, recorded: TeacherManifest, taps: Sequence[str], shards: Sequence[Shard]
) -> TeacherAnswers | None:
    """What the store has of all shards in one view without chance, of the first of the taps; None where it has none."""
    by_tap = (_complete(query, store, recorded, tap, shards) for tap in taps)
    by_view = next((by_view for by_view in by_tap if by_view), None)
    if by_view is None:
        return None
    view = _only_view(store, recorded, [*by_view])
    best = min(by_view[view], key=lambda one: _roughness(one.target))
    tap = best.target.identity.tap
    kept = evaluation_targets(store, [best], shards, view, why=f"{query.name} is measured by stored {tap}")
    (target,) = kept.targets
    return TeacherAnswers(
        evaluated=EvaluatedTeacher(teacher=query.name, source=target, view=view.line, view_size=view.size),
        classes=_normalized(recorded.classes),
        text=WORDS.get(tap, tap),
        width=best.target.sample_shape[0],
        read=lambda read_shards, chosen: stored_answers(kept, target, read_shards, chosen),
    )


def _complete(
    query: TeacherQuery, store: Store, recorded: TeacherManifest, tap: str, shards: Sequence[Shard]
) -> dict[Policy, list[StoredTarget]]:
    """View without chance -> the teacher's targets of a tap that the store has of all shards in it."""
    by_view: dict[Policy, list[StoredTarget]] = {}
    for manifest in store.targets().values():
        if manifest.teacher == recorded.id and manifest.identity.tap == tap:
            view, one = policy_of(store.bank(manifest.identity.bank)), StoredTarget(target=manifest, teacher=recorded)
            if _fits(query, view) and not kept_of(store, [one], shards, view)[1]:
                by_view.setdefault(view, []).append(one)
    return by_view


def _fits(query: TeacherQuery, view: Policy) -> bool:
    """Whether views have no chance in them and are what was asked for."""
    line = None if query.view_policy is None else policy(query.view_policy, view.size).line
    return not view.random and line in (None, view.line) and query.view_size in (None, view.size)


def _only_view(store: Store, recorded: TeacherManifest, views: Sequence[Policy]) -> Policy:
    """The usual view, or the only one. Raises UserError: several others."""
    usual = [view for view in views if (view.line, view.size) == (USUAL, recorded.identity.input_size)]
    if len(usual or views) > 1:
        names = ", ".join(f"{view.line} at {view.size}" for view in views)
        hint = f"Choose one: {setting('view_policy', repr(views[0].line))} {setting('view_size', views[0].size)}"
        raise UserError(f"{store.url} has {recorded.id} in several views without chance: {names}", hint=hint)
    return (usual or views)[0]


def _roughness(target: TargetManifest) -> tuple[int, int]:
    """How much a codec loses: the least is the best of several copies of one thing."""
    codec = target.codec
    return next(n for n, name in enumerate(CODECS) if codec.name.startswith(name)), -codec.sample_bytes


def _live(
    teacher: Teacher, query: TeacherQuery, tap: Tap, device: torch.device, read: Reading | None, why: str
) -> TeacherAnswers:
    """What the network says now of its evaluation view."""
    view = policy(query.view_policy or USUAL, query.view_size or teacher.input_size)
    if teacher.ready:
        raise _ready(query, query.model)
    try:
        module = live_teacher(teacher, [tap], view.size).to(device)
    except UserError as error:
        features = call("evaluate", "knn", "…", teacher=query.name)
        hint = f"Its features can be measured: {features}" if tap.name == "logits" else ""
        message = (
            error.message if error.message.startswith(teacher.name) else f"teacher {teacher.name}: {error.message}"
        )
        raise UserError(message, setting=error.setting, hint=error.hint or hint) from None
    Console().say(f"{teacher.name} runs live on the view {view.line} at {view.size} ({why})")

    def answer(images: Tensor) -> Tensor:
        return _answer(module, images, read, teacher.name)

    def answers(shards: Sequence[Shard], chosen: Sequence[np.ndarray] | None) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in evaluation_batches(shards, view, BATCH, chosen=chosen):
            on_device = batch.to(device)
            yield answer(on_device.images), on_device.labels

    blank = torch.zeros(1, view.size, view.size, 3, dtype=torch.uint8, device=device)
    return TeacherAnswers(
        evaluated=EvaluatedTeacher(teacher=teacher.name, source=LIVE, view=view.line, view_size=view.size),
        classes=_normalized(teacher.classes),
        text=WORDS.get(tap.name, tap.name) if read is None else feature_text(module.model, read),
        width=answer(blank).shape[1],
        read=answers,
    )


@torch.no_grad()
def _answer(module: TappedTeacher, images: Tensor, read: Reading | None, name: str) -> Tensor:
    """A live teacher's tap, or what is read in its place, of view images."""
    if read is None:
        return read_taps(module, images, name)[0][0]
    return read(module.model, module.prepare(images))


def _normalized(classes: Sequence[str] | None) -> tuple[str, ...] | None:
    return tuple(all_normalized(classes)) if classes else None


def _require_without_chance(view: Policy) -> None:
    if view.random:
        raise UserError(
            "every image counts once in an evaluation, and views of this policy differ",
            setting=setting("view_policy", repr(view.line)),
            hint=f"Leave it out, or give one without chance, such as {setting('view_policy', 'eval')}",
        )
