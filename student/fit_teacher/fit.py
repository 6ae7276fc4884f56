"""Teachers made here: a linear head for the shards' classes, fitted on what a teacher saw and written out with it.

Features and labels come from the store; no image is decoded for them. What comes out is an ordinary file of weights
with `classes`, whose logits can be precomputed, exported and verified like any other's.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from precompute.taps import TAPS, Tap
from storage.errors import UserError, call, did_you_mean, setting
from storage.memory import memory_limit
from storage.objects.state_dict import save_state
from storage.objects.weights_file import WeightsFile
from storage.progress import Progress, size_text
from storage.shards.classes import classes_of, require_classes
from storage.shards.patterns import expand
from storage.shards.shard import open_shards, require_labels
from storage.store.banks import read_views
from storage.store.markers import Task
from storage.views.view import COLUMNS
from student.data.block_reader import BlockReader
from student.data.stream import Stream
from student.evaluation.accuracy import evaluate, tell_of_shared
from student.fit_teacher.logistic_regression import STRENGTHS, Examples, StrengthTrial, fit, search_strength
from student.fit_teacher.network import Classifier, arguments_of, check, network_of, put_in, tapped

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from storage.store.manifests import TeacherManifest
    from storage.store.store import Store

SERVE = [tap for tap, info in TAPS.items() if info.axes == ("width",)]  # taps that a linear head can act on


@dataclass(frozen=True)
class FitTeacherConfig:
    """What a fit is asked for; what is None is chosen or found in the store."""

    store: Store
    shards: Sequence[str]
    val: Sequence[str]
    out: Path
    target: str | None = None
    teacher: str | None = None
    weights: str | None = None  # a file, if the recorded one is not there
    views: int | None = None
    l2: float | None = None
    seed: int = 0
    device: str = "cpu"
    memory: int | None = None  # bytes that features may take; by default half of the machine's


@dataclass(frozen=True, slots=True, kw_only=True)
class FitTeacherResult:
    """The new teacher, what it was fitted on, and how good it is."""

    out: str
    sha256: str
    teacher: str  # the recorded one, whose network it is
    target: str  # the features
    model: str
    arguments: dict[str, Any]
    input_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...]
    bank: str | None
    policy: str
    view_size: int
    view_seed: int
    views: int | None
    features: int  # that the head was fitted on
    l2: float
    tried: list[StrengthTrial]
    errors: dict[str, float]  # as `student.fit_teacher.network.check` gives them
    top1: float  # percent of the validation samples
    top5: float | None
    samples: int
    seconds: float


def fit_teacher(config: FitTeacherConfig, progress: Progress) -> FitTeacherResult:
    """Fit a head, put it into the teacher's network, check it on real images and write it; what came out.

    Raises:
        UserError: no or several targets fit, no class names, too little memory, a network whose classifier does not act
            on the target, a label without a class, a file that is there already.
        IdentityError: other shards, classes or weights than the store's.
        DamageError: a missing or damaged object.
    """
    began, out, store, device = time.monotonic(), config.out, config.store, config.device
    if out.suffix != ".safetensors" or out.exists():
        problem = "already exists; give a new name" if out.exists() else "expected a name ending in .safetensors"
        raise UserError(problem, setting=setting("out", out))
    if not out.absolute().parent.is_dir():
        raise UserError(f"the folder {out.parent} does not exist", setting=setting("out", out))
    urls, val_shards = expand(config.shards), open_shards(config.val, progress.say)
    names = _classes(urls, [shard.url for shard in val_shards])
    for shard in val_shards:
        require_labels(shard, len(names))
    target = choose_target(store, config.target, config.teacher)
    recorded = store.teachers()[store.target(target).teacher]
    stream = Stream(urls, batch_size=1, lanes=1, store=store, targets=[target], views=config.views)
    tell_of_shared(stream.source.shard_ids, val_shards, progress.say)
    model = network_of(recorded, config.weights, len(names))
    examples = read_examples(stream, target, len(names), progress.say, config.memory)
    count = len(examples.labels)
    progress.say(f"{count:,} features of {target}: {stream.order.samples:,} samples, {stream.views} view(s)")
    l2, trials = config.l2, []
    if l2 is None:
        trials = _strength(examples, len(names), config.seed, progress)
        l2 = trials[0].l2
    progress.say(f"fitting on all of them, l2 {l2:g}")
    head = fit(examples, torch.arange(count), len(names), l2)
    put_in(model, head, recorded.id)
    errors = check(model, head, stream, target, recorded)
    on_live, on_stored = (f"{errors[name]:.1e}" for name in ("head", "stored"))
    progress.say(f"live logits against the head on live features: {on_live} of the largest, on stored ones {on_stored}")
    progress.start("evaluating", sum(map(len, val_shards)))
    classifier = Classifier(tapped(model, [Tap("logits")], stream, recorded)).to(device)
    views, mean, std = stream.source.policy, (0, 0, 0), (1, 1, 1)  # it normalizes by itself
    score = evaluate(
        classifier, val_shards, views.evaluation, mean, std, batch_size=64, device=device, advance=progress.advance
    )
    save_state(out, model.state_dict(), _metadata(config, recorded, stream, names, l2))
    identity = recorded.identity
    return FitTeacherResult(
        out=str(out),
        sha256=WeightsFile(out).digest,
        teacher=recorded.id,
        target=target,
        model=identity.model,
        arguments={**identity.arguments, "num_classes": len(names)},
        input_size=identity.input_size,
        mean=identity.mean,
        std=identity.std,
        classes=names,
        bank=stream.source.bank,
        policy=views.line,
        view_size=views.size,
        view_seed=views.seed,
        views=stream.views,
        features=count,
        l2=l2,
        tried=trials,
        errors=errors,
        **asdict(score),
        seconds=round(time.monotonic() - began, 2),
    )


def _classes(urls: Sequence[str], val_urls: Sequence[str]) -> tuple[str, ...]:
    """The class names of the shards: contract 10, never guessed from labels."""
    names = classes_of(urls)
    if names is None:
        hint = f"Write their names there, a JSON list in the order of the labels, as {call('pack')} does."
        raise UserError(f"{urls[0]}: no classes.json beside it, so the teacher's classes are not known", hint=hint)
    require_classes(val_urls, names)
    return tuple(names)


def choose_target(store: Store, target: str | None, teacher: str | None) -> str:
    """The one target that fits: the one of this id, or the only one of this teacher with a tap that serves.

    Raises:
        UserError: none fits, or several do.
    """
    taps = " or ".join(SERVE)
    if target is not None:
        tap = store.target(target).identity.tap
        if tap not in SERVE:
            raise UserError(f"{store.url}: target {target} keeps {tap}; a linear head acts on {taps}")
        return target
    if teacher is not None and teacher not in (known := store.teachers()):
        raise UserError(f"{store.url}: no teacher is called {teacher!r}. {did_you_mean(teacher, known)}")
    fitting = [id for id, m in store.targets().items() if m.identity.tap in SERVE and teacher in (None, m.teacher)]
    if not fitting:
        hint = f"Add one: {call('precompute', '…', teacher=teacher or 'NAME', target='embedding')}"
        raise UserError(f"{store.url}: no target{f' of {teacher}' if teacher else ''} keeps {taps}", hint=hint)
    if len(fitting) > 1:
        hint = f"Choose one: {setting('target', 'ID')}"
        raise UserError(f"{store.url}: {len(fitting)} targets fit: {', '.join(fitting)}", hint=hint)
    return fitting[0]


def read_examples(
    stream: Stream, target: str, classes: int, say: Callable[[str], None] = lambda _: None, memory: int | None = None
) -> Examples:
    """Stored features of all valid samples in all views, with their mixed labels: shard, view and sample in order.

    Raises:
        UserError: they need more memory than is allowed, with figures; a label that there is no class for.
        DamageError: a missing or damaged object.
    """
    source, views = stream.source, stream.views or 0
    codec = source.targets[target]
    if len(codec.shape) != 1:
        shape = list(codec.shape)
        raise UserError(f"target {target} has values of shape {shape}; a linear head acts on rows of numbers")
    count, width = stream.order.samples * views, codec.shape[0]
    need = count * (4 * width + 28)
    budget = memory or memory_limit() // 2
    say(f"features take {size_text(need)} of memory")
    if need > budget:
        raise UserError(
            f"{count:,} features ({stream.order.samples:,} samples × {views} views) of {width} numbers take "
            f"{size_text(need)}, {size_text(budget)} are allowed",
            hint=f"Give fewer shards, or fewer views: {setting('num_views', 'N')}",
        )
    integers = torch.empty(3, count, dtype=torch.int64)
    examples = Examples(torch.empty(count, width), integers[0], integers[1], torch.empty(count), integers[2])
    reader, at = BlockReader(source), 0
    columns = [COLUMNS.index(name) for name in ("mix", "partner", "amount")]
    for number, group in groupby(enumerate(stream.order.blocks), key=lambda numbered: numbered[1].shard):
        shard, segments = source.shards[number], list(group)
        require_labels(shard, classes)
        labels = torch.tensor(shard.index.labels)
        rows = torch.cat([torch.from_numpy(segment.samples) for _, segment in segments])
        blocks = torch.cat([torch.full((len(segment.samples),), i) for i, segment in segments])
        for view in range(views):
            arrays = reader.marker(Task("target", target, shard.id, view)).arrays
            values = {name: array.read(0, len(labels))[rows.numpy()] for name, array in arrays.items()}
            drawn = read_views(reader.marker(Task("bank", str(source.bank), shard.id, view)), 0, len(labels)).rows
            mix, partner, amount = torch.tensor(drawn[:, columns])[rows].T
            to = slice(at, at + len(rows))
            examples.features[to] = torch.from_numpy(codec.decode(values))
            examples.labels[to], examples.blocks[to] = labels[rows], blocks
            examples.mix_labels[to] = labels[torch.where(mix > 0, partner.long(), rows)]
            examples.mix_weights[to] = torch.where(mix > 0, amount / 256, 0).float()
            at += len(rows)
    return examples


def _strength(examples: Examples, classes: int, seed: int, progress: Progress) -> list[StrengthTrial]:
    """The λ that were tried on blocks held out of the training shards, best first."""
    if len(torch.unique(examples.blocks)) < 2:
        message = "one block of 64 samples leaves none to choose the strength of the L2 term by"
        raise UserError(message, hint=f"Give it: {setting('l2', 0.01)}")
    progress.start("choosing l2", len(STRENGTHS))
    trials = search_strength(examples, classes, seed, progress.advance)
    for trial in trials:
        progress.say(f"l2 {trial.l2:g}: loss {trial.loss:.4f}, top-1 {trial.top1:.2f} % on held-out training samples")
    return trials


def _metadata(
    config: FitTeacherConfig, recorded: TeacherManifest, stream: Stream, names: Sequence[str], l2: float
) -> dict[str, str]:
    """What the file of weights says of itself: what rebuilds the network, its classes, and where they came from."""
    identity, (target,) = recorded.identity, stream.source.targets
    fitted_on = {"target": target, "shards": list(stream.source.shard_ids), "views": stream.views}
    origin = {"teacher": identity.plain(), **fitted_on, "l2": l2, "seed": config.seed}
    return {
        "format": "pt",
        "model": identity.model,
        "arguments": json.dumps({**arguments_of(recorded), "num_classes": len(names)}, sort_keys=True),
        "img_size": str(identity.input_size),
        "mean": json.dumps(identity.mean),
        "std": json.dumps(identity.std),
        "classes": json.dumps(list(names)),
        "evaluation": stream.source.policy.evaluation.line,
        "fitted": json.dumps(origin, sort_keys=True),
    }
