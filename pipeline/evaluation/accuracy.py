"""What `pipeline evaluate accuracy` measures and prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pipeline.evaluation.common import Evaluated, columns, named_sets, number, open_student, progress
from pipeline.evaluation.teacher import TeacherQuery, open_teacher, require_known_classes
from storage.errors import UserError
from storage.shards.shard import open_shards
from student import run_dir
from student.attention_copy.inference import attach_stored_attention
from student.distributed import pick_device
from student.evaluation.class_metrics import BOUNDS, ClassMetrics, ShotMetrics, class_metrics
from student.evaluation.ensemble import Predictions, ensemble_predictions, predictions_of
from student.evaluation.frozen.label_subset import images_of_classes
from student.models.files import load_classifier

if TYPE_CHECKING:
    from pathlib import Path

MAX_LISTED_CLASSES = 20  # more are not printed one by one

BySet = Mapping[str, ClassMetrics]  # the set without a name is ``


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracyReport:
    """Accuracies of students, or of a teacher, each over the same sets, and of an ensemble where it was asked for."""

    evaluated: tuple[tuple[Evaluated, BySet], ...]
    ensemble: BySet | None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        students = [{**asdict(student), **_sets_json(by_set)} for student, by_set in self.evaluated]
        if len(students) == 1:
            return students[0]
        if self.ensemble is None:
            return {"students": students}
        names = [student.name for student, _ in self.evaluated]
        return {"students": students, "ensemble": {"students": names, **_sets_json(self.ensemble)}}

    def lines(self) -> list[str]:
        """One line for one network on one set, else a table; then shots and classes."""
        results = [(one.name, by_set) for one, by_set in self.evaluated]
        results += [("ensemble", self.ensemble)] if self.ensemble is not None else []
        titled = [
            (", ".join(word for word in (title if len(results) > 1 else "", name) if word), metrics)
            for title, by_set in results
            for name, metrics in by_set.items()
        ]
        if len(titled) == 1:
            ((_, metrics),) = titled
            top5 = f", top-5 {metrics.top5:.2f} %" if metrics.top5 is not None else ""
            lines = [f"top-1 {metrics.top1:.2f} %{top5} on {metrics.samples} samples ({self.evaluated[0][0].how})"]
        else:
            cells = [(title or "all", str(one.samples), number(one.top1), number(one.top5)) for title, one in titled]
            lines = columns([("", "samples", "top-1, %", "top-5, %"), *cells])
        for title, metrics in titled:
            start = f"{title}: " if title else ""
            if metrics.shots:
                lines += [f"{start}{line}" for line in _shot_lines(metrics.shots)]
            if len(metrics.classes) <= MAX_LISTED_CLASSES:
                each = ", ".join(f"{one.name} {one.top1:.1f}" for one in metrics.classes)
                lines.append(f"{start}top-1 of each class, %: {each}")
        return lines


def _sets_json(by_set: BySet) -> dict[str, Any]:
    named = {name: metrics.to_json() for name, metrics in by_set.items() if name}
    return {**(by_set[""].to_json() if "" in by_set else {}), **({"sets": named} if named else {})}


def _shot_lines(shots: ShotMetrics) -> list[str]:
    low, high = shots.bounds
    groups = {
        f"many-shot classes, more than {high}": shots.many,
        f"medium-shot classes, {low} to {high}": shots.medium,
        f"few-shot classes, fewer than {low}": shots.few,
    }
    return [
        f"{group} training images: top-1 {number(one.top1)} % ({one.classes} classes, {one.samples} samples)"
        for group, one in groups.items()
    ]


def measure_accuracy(
    paths: Sequence[Path],
    *,
    shards: Sequence[str],
    ensemble: bool,
    shot_bounds: tuple[int, int] | None,
    train_shards: Sequence[str],
    store: str | None,
    device: str,
) -> AccuracyReport:
    """Accuracies of students, alone and perhaps together, over one or several sets.

    Args:
        paths: the students' files.
        shards: labeled shards; `NAME=SHARDS` is a set of its own.
        ensemble: whether all together are evaluated too.
        shot_bounds: tell classes apart by their number of training images.
        train_shards: where training images are counted; by default the first run's record says it.
        store: where students that copy attention find it; by default where they were trained.
        device: as on the command line.
    """
    sets, torch_device = named_sets(shards), pick_device(device)
    train_images = None if shot_bounds is None else _train_images(paths[0], train_shards)
    members, students = zip(*(open_student(path, torch_device, load_classifier) for path in paths), strict=True)
    classes, results = members[0].about.classes, [dict[str, ClassMetrics]() for _ in range(len(members) + ensemble)]
    with progress("evaluating", sum(len(shard) for opened in sets.values() for shard in opened)) as advance:
        for name, opened in sets.items():
            for member in members:
                attach_stored_attention(member.model, member.about, store, opened)
            seen = ensemble_predictions(members, opened, ensemble=ensemble, device=torch_device, advance=advance)
            for by_set, metrics in zip(results, _metrics(seen, shot_bounds, train_images, classes), strict=True):
                by_set[name] = metrics
    together = results.pop() if ensemble else None
    return AccuracyReport(evaluated=tuple(zip(students, results, strict=True)), ensemble=together)


def measure_teacher_accuracy(
    teacher: TeacherQuery,
    *,
    shards: Sequence[str],
    shot_bounds: tuple[int, int] | None,
    train_shards: Sequence[str],
    same_classes: bool,
    device: str,
) -> AccuracyReport:
    """Accuracies of a teacher over one or several sets, by its stored logits or live.

    Args:
        teacher: which one.
        shards: labeled shards; `NAME=SHARDS` is a set of its own.
        shot_bounds: tell classes apart by their number of training images.
        train_shards: where training images are counted.
        same_classes: the labels are the teacher's classes, where one list of names is not known.
        device: as on the command line.

    Raises:
        UserError: a teacher without a classifier, or classes that are not known to be the same.
        IdentityError: the set has a class that the teacher does not know.
    """
    sets = named_sets(shards)
    train_images = None if shot_bounds is None else images_of_classes(open_shards(train_shards))
    every = [shard for opened in sets.values() for shard in opened]
    answers = open_teacher(teacher, ("logits",), every, pick_device(device))
    for opened in sets.values():
        require_known_classes(answers, opened, same_classes)
    by_set: dict[str, ClassMetrics] = {}
    with progress("evaluating", sum(map(len, every))) as advance:
        for name, opened in sets.items():
            seen = predictions_of(answers.batches(opened), opened, answers.classes, advance=advance)
            (by_set[name],) = _metrics(seen, shot_bounds, train_images, answers.classes)
    return AccuracyReport(evaluated=((answers.evaluated, by_set),), ensemble=None)


def _train_images(path: Path, train_shards: Sequence[str]) -> Mapping[int, int]:
    """Label -> training images: of the shards that were given, else as the run's record says. Raises UserError."""
    if train_shards:
        return images_of_classes(open_shards(train_shards))
    recorded = run_dir.about(path.parent).get("images")
    if isinstance(recorded, dict) and all(k.isdecimal() and isinstance(n, int) for k, n in recorded.items()):
        return {int(label): count for label, count in recorded.items()}
    raise UserError(
        f"{path.parent / run_dir.ABOUT}: does not say how many training images each class had; give the shards that it "
        "was trained on: --train-shards"
    )


def _metrics(
    seen: Predictions,
    shot_bounds: tuple[int, int] | None,
    train_images: Mapping[int, int] | None,
    classes: Sequence[str] | None,
) -> list[ClassMetrics]:
    """Accuracies over a set, of each classifier: its labels may be some of the `classes` in another order."""
    if train_images and classes and seen.names:
        numbers = {name: n for n, name in enumerate(classes)}
        train_images = {n: train_images.get(numbers[name], 0) for n, name in enumerate(seen.names)}
    bounds, count = shot_bounds or BOUNDS, seen.num_classes
    return [
        class_metrics(seen.labels, ranks, count, names=seen.names, train_images=train_images, bounds=bounds)
        for ranks in seen.ranks
    ]
