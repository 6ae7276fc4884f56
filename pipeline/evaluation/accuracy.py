"""What `pipeline evaluate accuracy` measures, as plain data and as lines to print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.console import Console
from pipeline.evaluation.common import Said, columns, opened, percent, sets_of
from storage.errors import UserError
from storage.shards.index import cached_index
from storage.shards.patterns import expand
from student import run_dir
from student.attention_copy.inference import attach_stored_attention
from student.distributed import pick_device
from student.evaluation.class_metrics import BOUNDS, PARTS, class_metrics
from student.evaluation.ensemble import ensemble_predictions
from student.evaluation.frozen.label_subset import images_of_classes
from student.models.files import load_classifier

FEW = 20  # classes that are still printed one by one


def measure_accuracy(
    paths: Sequence[Path],
    patterns: Sequence[str],
    *,
    ensemble: bool,
    bounds: tuple[int, int] | None,
    train_shards: Sequence[str],
    store: str | None,
    device: str,
) -> Said:
    """Accuracies of students, alone and perhaps together, over one or several sets.

    Those that copy attention find it in `store`, by default where they learned.
    """
    sets = sets_of(patterns)
    where, console = pick_device(device), Console()
    images = None if bounds is None else _images(paths[0], train_shards)
    members, answers = map(list, zip(*(opened(path, where, console, load_classifier) for path in paths), strict=True))
    if ensemble:
        answers.append({"students": [member.name for member in members]})
    console.start("evaluating", sum(len(cached_index(url)) for urls in sets.values() for url in urls))
    try:
        for name, urls in sets.items():
            for member in members:
                attach_stored_attention(member.model, member.about, store, urls)
            found = ensemble_predictions(members, urls, ensemble=ensemble, device=where, advance=console.advance)
            counts = images and _counts(images, members[0].about.classes, found.names)
            for answer, places in zip(answers, found.places, strict=True):
                told = class_metrics(found.labels, places, found.classes, found.names, counts, bounds or BOUNDS)
                if name:
                    answer.setdefault("sets", {})[name] = told
                else:
                    answer.update(told)
    finally:
        console.stop()
    titles = [*map(str, paths), *(["together"] if ensemble else [])]
    lines = _lines(list(zip(titles, answers, strict=True)))
    if len(members) == 1:
        return answers[0], lines
    return {"students": answers[: len(members)], **({"ensemble": answers[-1]} if ensemble else {})}, lines


def _images(path: Path, counted: Sequence[str]) -> Mapping[int, int]:
    """Label -> training images: of the shards that were given, else as the run's record says. Raises UserError."""
    if counted:
        return images_of_classes(expand(counted))
    recorded = run_dir.about(path.parent).get("images")
    if isinstance(recorded, dict) and all(k.isdecimal() and isinstance(n, int) for k, n in recorded.items()):
        return {int(label): count for label, count in recorded.items()}
    raise UserError(
        f"{path.parent / run_dir.ABOUT}: does not say how many training images each class had; give the shards that it "
        "was trained on: --train-shards"
    )


def _counts(images: Mapping[int, int], trained: Sequence[str] | None, names: Sequence[str] | None) -> Mapping[int, int]:
    """Training images by a set's own labels, which may be some of the student's classes in another order."""
    if trained is None or names is None:
        return images
    numbers = {name: n for n, name in enumerate(trained)}
    return {n: images.get(numbers[name], 0) for n, name in enumerate(names)}


def _lines(answers: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """One line for one student on one set, else a table; then the parts and the classes."""
    rows = [
        (title, name, told)
        for title, answer in answers
        for name, told in {**({"": answer} if "top1" in answer else {}), **answer.get("sets", {})}.items()
    ]

    def of(title: str, name: str) -> str:
        return ", ".join(word for word in (title if len(answers) > 1 else "", name) if word)

    _, _, first = rows[0]
    if len(rows) == 1:
        top5 = f", top-5 {first['top5']:.2f} %" if first["top5"] is not None else ""
        lines = [f"top-1 {first['top1']:.2f} %{top5} on {first['samples']} samples ({answers[0][1]['view']})"]
    else:
        cells = [
            (of(title, name) or "all", str(told["samples"]), percent(told["top1"]), percent(told["top5"]))
            for title, name, told in rows
        ]
        lines = columns([("", "samples", "top-1, %", "top-5, %"), *cells])
    for title, name, told in rows:
        begin = f"{of(title, name)}: " if of(title, name) else ""
        if "bounds" in told:
            low, high = told["bounds"]
            texts = (f"more than {high}", f"{low} to {high}", f"fewer than {low}")
            lines += [
                f"{begin}{part}-shot classes, {text} training images: top-1 {percent(told[part]['top1'])} % "
                f"({told[part]['classes']} classes, {told[part]['samples']} samples)"
                for part, text in zip(PARTS, texts, strict=True)
            ]
        if len(told["classes"]) <= FEW:
            each = ", ".join(f"{one['class']} {one['top1']:.1f}" for one in told["classes"])
            lines.append(f"{begin}top-1 of each class, %: {each}")
    return lines
