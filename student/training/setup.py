"""Builds a training run and checks it before the first step: classes, student, stream, distiller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from precompute.taps import image_size
from storage.errors import IdentityError, UserError, call, setting
from storage.objects.network_names import is_recorded, key_of
from storage.objects.weights_file import WeightsFile
from storage.shards.classes import classes_of, require_classes
from storage.shards.patterns import expand
from storage.shards.shard import Shard, open_shards, require_labels
from storage.views.policy import Policy, policy
from student.alignment.attention import AttentionAligner
from student.alignment.native_parts import missing_parts_of_teachers
from student.alignment.report import alignment_table
from student.attention_copy.inference import record_of, stored_attention
from student.data.source import opened
from student.data.stream import Stream
from student.distributed import rank, world_size
from student.evaluation.accuracy import tell_of_shared
from student.models.build import architecture, build_student
from student.models.files import StudentDescription
from student.models.init import begin_from, channels_text, freeze, normalization
from student.models.outside_timm import recorded_name
from student.settings import ATTENTION_COPY
from student.training.controls import fill_means, mean_targets
from student.training.distiller import Distiller, classifies, find_targets, student_taps_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from storage.progress import Progress
    from storage.store.manifests import TeacherIdentity
    from storage.store.store import Store
    from student.models.attention_copy_hooks import AttentionCopyRecord
    from student.recipe.schema import Recipe
    from student.targets.stored_target import StoredTarget


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Settings and inputs of a training run.

    Attributes:
        recipe: the whole recipe.
        shards: patterns of training shards.
        val: patterns of validation shards; none are needed where no loss reads labels.
        out: the run's folder.
        store: with the targets.
        device: of this process.
        resume: resume from the folder's checkpoint.
        smoke: run a few steps of each phase only, to see that everything works.
    """

    recipe: Recipe
    shards: str | Sequence[str]
    val: str | Sequence[str]
    out: Path
    store: Store | None = None
    device: str = "cpu"
    resume: bool = False
    smoke: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRun:
    """All parts of a training run.

    Attributes:
        stream: the batches.
        distiller: student and losses, on the device.
        average: the averaged student, or None.
        frozen_norms: modules with frozen running statistics.
        val_shards: the validation shards that students are scored on; empty where no score can be taken.
        description: saved with the student's weights.
        identity: what must be equal in a resumed run.
    """

    stream: Stream
    distiller: Distiller
    average: Any
    frozen_norms: list[nn.Module]
    val_shards: list[Shard]
    description: StudentDescription
    identity: dict[str, Any]


def build_run(config: TrainConfig, progress: Progress, saved: dict[str, Any] | None) -> TrainingRun:
    """Build a run, and report what was chosen.

    Args:
        config: settings and inputs.
        progress: for reports.
        saved: content of the checkpoint to resume from: it has the weights, and fixes the number of views.

    Raises:
        UserError: as its parts do.
    """
    from timm.utils import ModelEmaV3  # after precompute.taps made it importable

    recipe = config.recipe
    torch.manual_seed(recipe.seed)
    urls, val_shards = expand(config.shards), open_shards(config.val, progress.say) if config.val else []
    classes, count = _classes(urls, [shard.url for shard in val_shards], recipe) if classifies(recipe) else (None, 0)
    scored = _scored(val_shards, recipe, count, progress)
    student = architecture(recipe.student, _teacher(config.store, recipe.student.like))
    recorded = recorded_name(student.model)
    model, arguments = build_student(student, count)
    file = WeightsFile(student.weights) if student.weights else None
    if saved is None:
        begin_from(model, student, file, classes, progress.say)
    mean, std = normalization(student, file, model)
    if saved is not None:
        mean, std = (tuple(saved["identity"][name]) for name in ("mean", "std"))
    elif student.pretrained or student.weights:
        progress.say(f"pixels: mean {channels_text(mean)}, std {channels_text(std)}")
    frozen_norms = freeze(model, student.freeze, progress.say)
    size = student.img_size or image_size(model)
    average = None
    if recipe.model_ema_decay:  # before hooks are added
        average = ModelEmaV3(model, decay=recipe.model_ema_decay).to(config.device)
    views = saved["identity"]["views"] if saved else None
    stream, targets = _stream(config, urls, model, size=size, classes=count, views=views)
    for line in (_views_text(stream), *stream.notices, *missing_parts_of_teachers(model, targets.values())):
        progress.say(line)
    distiller = Distiller(recipe, model, targets, mean=mean, std=std, class_names=classes)
    if distiller.rows:
        progress.say(alignment_table(distiller.rows))
    _control(recipe, stream, distiller, progress)
    if saved is None:
        _average_examples(stream, distiller, progress)
    distiller.to(config.device)
    source = stream.source
    tell_of_shared(source.shard_ids, val_shards, progress.say)
    attention_copy = _attention_copy(config, stream, distiller, progress, average=average, scored=scored)
    description = StudentDescription(
        model=recorded,
        arguments=arguments,
        img_size=size,
        mean=mean,
        std=std,
        classes=classes,
        evaluation=source.policy.evaluation.line,
        shifted_patches=student.shifted_patches,
        attention_copy=attention_copy,
    )
    identity = {
        "shards": list(source.shard_ids),
        "validation shards": [shard.id for shard in val_shards],
        "classes": list(classes) if classes else count,
        "bank": source.bank,
        "policy": source.policy.line,
        "targets": {name: list(ids) for name, ids in distiller.target_ids.items()},
        "views": stream.views,
        "control": recipe.control.model_dump(exclude_defaults=True),
        "mean": list(mean),
        "std": list(std),
    }
    if is_recorded(description.model):
        identity["network"] = key_of(description.model)  # whose file may change
    if digests := {name: loss.source_digest for name, loss in distiller.terms.items() if loss.source_digest}:
        identity["links"] = digests  # taken from another run, whose folder may change
    return TrainingRun(
        stream=stream,
        distiller=distiller,
        average=average,
        frozen_norms=frozen_norms,
        val_shards=scored,
        description=description,
        identity=identity,
    )


def _teacher(store: Store | None, name: str | None) -> TeacherIdentity | None:
    """The teacher that a store has under a name."""
    known = store.teachers().get(name) if store is not None and name is not None else None
    return known.identity if known else None


def _scored(val_shards: list[Shard], recipe: Recipe, classes: int, progress: Progress) -> list[Shard]:
    """The validation shards that students are scored on; reports where there are none.

    Raises:
        UserError: a loss reads labels, and there are no validation shards, or their labels are missing or other ones.
    """
    labels = "labels" in student_taps_of(recipe)
    if labels and not val_shards:
        raise UserError(
            "this recipe learns from labels, so its students are scored on others",
            hint=f"Give {setting('val', 'SHARDS')}, which {call('pack', '…', val_fraction=0.1)} cuts off.",
        )
    if not classes:
        unused = "" if recipe.student.num_classes is None else " (student.num_classes is not used)"
        progress.say(f"no loss trains a classifier: the student is made without one{unused}, and no score is taken")
        return []
    bare = [] if labels else [shard.url for shard in val_shards if not shard.summary.labelled]
    if bare or not val_shards:
        progress.say(f"{f'{bare[0]} has no labels' if bare else 'no validation shards'}: no score is taken")
        return []
    for shard in val_shards:
        require_labels(shard, classes)
    return val_shards


def _stream(
    config: TrainConfig, urls: list[str], model: nn.Module, *, size: int, classes: int, views: int | None
) -> tuple[Stream, dict[str, tuple[StoredTarget, ...]]]:
    """The stream, and each loss's stored targets."""
    recipe, settings = config.recipe, config.recipe.stream
    shards = list(opened(urls, config.store)) if config.store is not None else []
    bank, targets = find_targets(config.store, [shard.id for shard in shards if len(shard)], recipe, model)
    fresh: Policy | None = None
    if bank is None:
        choice = settings.bank
        if choice.id is not None or settings.views is not None:
            hint = f"Give {setting('store', 'DIR')}"
            raise UserError("stream.bank and stream.views are about a store's bank", hint=hint)
        seed = choice.seed if choice.seed is not None else recipe.seed
        fresh = policy(choice.policy or "light", choice.size or size, seed)
    parts = recipe.optim.grad_accum_steps
    if settings.batch_size % (world_size() * parts):
        raise UserError(
            f"stream.batch_size={settings.batch_size} cannot be split into {world_size()} rank(s) of "
            f"optim.grad_accum_steps={parts} equal parts each; give a multiple of {world_size() * parts}"
        )
    labels = "labels" in student_taps_of(recipe)
    stream = Stream(
        shards or urls,
        **settings.model_dump(include={"batch_size", "lanes", "shuffle_blocks", "workers"}),
        store=config.store,
        targets=list(dict.fromkeys(stored.id for its_targets in targets.values() for stored in its_targets)),
        policy=fresh,
        bank=bank,
        views=settings.views or views,
        seed=recipe.seed,
        memory=int(settings.memory * 2**30) if settings.memory else None,
        rank=rank(),
        world_size=world_size(),
        labels=labels,
        classes=classes if labels else None,
        permute=recipe.control.permute_targets,
    )
    used = stream.source.policy
    if used.size != size:
        hint = f"Give the student the size of its views: {setting('student.img_size', used.size)}"
        words = ("the student takes", "they have")
        raise IdentityError(f"views of {bank or 'stream.bank'}", "size", size, used.size, hint, words)
    return stream, targets


def _views_text(stream: Stream) -> str:
    used = stream.source.policy
    if stream.source.bank is None:
        return f"views: drawn afresh, {used.line}, size {used.size}, seed {used.seed}"
    return f"views: stored, {used.line}, {stream.views} a sample, bank {stream.source.bank}"


def _control(recipe: Recipe, stream: Stream, distiller: Distiller, progress: Progress) -> None:
    """Replace targets by those of a control, where the recipe asks for one."""
    control = recipe.control
    if control.permute_targets is None and not control.mean_targets:
        return
    if not distiller.target_ids:
        raise UserError("control speaks of stored targets, and this recipe's losses read none")
    if control.mean_targets:
        distiller.means = mean_targets(stream, progress)
        progress.say("control: every image gets the mean target of the training set")
    else:
        progress.say(f"control: targets of other images of the same block, permuted by seed {control.permute_targets}")


def _average_examples(stream: Stream, distiller: Distiller, progress: Progress) -> None:
    """Fill mean maps over the training set, where losses read these; a resumed run has them from its checkpoint."""
    copier = {} if distiller.copier is None else {ATTENTION_COPY: distiller.copier}
    aligners = {
        name: (module, distiller.target_ids[name])
        for name, part in {**distiller.terms, **copier}.items()
        for module in part.modules()
        if isinstance(module, AttentionAligner) and module.average == "examples"
    }
    if aligners:
        fill_means(aligners, stream, progress)


def _attention_copy(
    config: TrainConfig, stream: Stream, distiller: Distiller, progress: Progress, *, average: Any, scored: list[Shard]
) -> AttentionCopyRecord | None:
    """Attach the sources of copied attention for evaluation; the record for the student's file.

    None for a student that copies nothing.

    Raises:
        UserError: the store has none of the validation images.
    """
    copier, store = distiller.copier, config.store
    if copier is None or store is None:
        return None
    hooks, permute = copier.hooks, config.recipe.control.permute_targets
    targets = distiller.targets[ATTENTION_COPY]
    if average is not None:
        hooks.attach(average.module)
    if distiller.means:
        hooks.fixed = copier.copied([distiller.means[stored.id][None].to(config.device) for stored in targets])
    elif copier.config.average == "examples":
        hooks.fixed = {"map": copier.meets.get_buffer("mean")[None]}
    elif scored:
        view = stream.source.policy.evaluation
        hooks.source = stored_attention(store, copier, targets, scored, view, permute=permute)
    if "map" in hooks.parts:
        progress.say(f"{ATTENTION_COPY}: {len(hooks.layers)} layer(s) run unfused, where whole maps can go in")
    return record_of(copier, store, targets, permute)


def _classes(urls: list[str], val_urls: list[str], recipe: Recipe) -> tuple[tuple[str, ...] | None, int]:
    """The class names and their number, which is never guessed from labels."""
    names, val_names = classes_of(urls), classes_of(val_urls)
    if names:
        require_classes(val_urls, names)
    count = recipe.student.num_classes
    names = names or val_names
    if names is None and count is None:
        unknown = f"{urls[0]}: no classes.json beside it, so the number of classes is not known"
        raise UserError(unknown, hint=f"Give it: {setting('student.num_classes', 'N')}")
    if names is not None and count not in (None, len(names)):
        where, hint = f"{urls[0]}: classes.json", "Leave student.num_classes out."
        words = ("the file names", "asked for")
        raise IdentityError(where, "student.num_classes", len(names), count, hint, words)
    count = count or len(names or ())
    if count < 2:
        raise UserError(f"{urls[0]}: one class alone, so there is nothing to learn; pack a folder for each of several")
    return (tuple(names) if names else None), count
