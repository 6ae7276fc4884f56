"""What `evaluate` does under each protocol, as plain data and as lines for people."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.console import Console
from storage.errors import UserError
from storage.shards import cached_index, classes_of, expand, with_samples
from student import folder
from student.device import pick_device
from student.evaluation import inside
from student.evaluation import knn as nearest
from student.evaluation import probe as linear
from student.evaluation.accuracy import places_of
from student.evaluation.features import Features, Reading, class_feature, feature_text, features_of, probe_feature
from student.evaluation.figures import BOUNDS, PARTS, figures
from student.evaluation.labelled import Labelled, images_of_classes, labelled
from student.evaluation.members import Member, seen
from student.lending import lend
from student.model import Description, load, load_classifier

Said = tuple[dict[str, Any], list[str]]
FEW = 20  # classes that are still printed one by one


@dataclass(frozen=True)
class Part:
    """Which samples have labels: patterns of training shards, the part of them, its seed, and where it is listed."""

    shards: Sequence[str]
    share: float
    seed: int
    listing: Path | None


def sets_of(patterns: Sequence[str]) -> dict[str, list[str]]:
    """Shards by the names of their sets; those without a name are the set ``.

    A name ends at the first `=`, and has no slash in it, as `split=val/000000.tar` may be a path that is there.

    Raises:
        UserError: as `expand` does; a set's name without shards.
    """
    named: dict[str, list[str]] = {}
    for pattern in patterns:
        match = re.fullmatch(r"([\w.-]+)=(.*)", pattern)
        name, rest = (match[1], match[2]) if match and not Path(pattern).exists() else ("", pattern)
        if not rest:
            raise UserError(f"--shards {pattern}: a name without shards; expected {name}=SHARDS")
        named.setdefault(name, []).append(rest)
    return {name: with_samples(expand(several), Console().say) for name, several in named.items()}


def only_set_of(patterns: Sequence[str]) -> list[str]:
    """Shards of a protocol that takes one set. Raises UserError: one with a name, or as `expand` does."""
    sets = sets_of(patterns)
    if named := [name for name in sets if name]:
        raise UserError(f"--shards {named[0]}=…: sets with names are for --protocol accuracy; give the shards alone")
    return sets[""]


def accuracy(
    paths: Sequence[Path],
    patterns: Sequence[str],
    ensemble: bool,
    bounds: tuple[int, int] | None,
    counted: Sequence[str],
    store: str | None,
    device: str,
) -> Said:
    """Accuracies of students, alone and perhaps together, over one or several sets.

    Those that copy attention find it in `store`, by default where they learned.
    """
    sets = sets_of(patterns)
    where, console = pick_device(device), Console()
    images = None if bounds is None else _images(paths[0], counted)
    members, answers = map(list, zip(*(opened(path, where, console, load_classifier) for path in paths), strict=True))
    if ensemble:
        answers.append({"students": [member.name for member in members]})
    console.start("evaluating", sum(len(cached_index(url)) for urls in sets.values() for url in urls))
    try:
        for name, urls in sets.items():
            for member in members:
                lend(member.model, member.about, store, urls)
            found = seen(members, urls, ensemble=ensemble, device=where, advance=console.advance)
            counts = images and _counts(images, members[0].about.classes, found.names)
            for answer, places in zip(answers, found.places, strict=True):
                told = figures(found.labels, places, found.classes, found.names, counts, bounds or BOUNDS)
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


def opened(
    path: Path, device: torch.device, console: Console, read: Callable[[Path], tuple[nn.Module, Description]] = load
) -> tuple[Member, dict[str, Any]]:
    """A student on a device, and which it is; with a word on one that learned nothing."""
    model, about = read(path)
    smoke = folder.is_smoke(path.parent)
    if smoke:
        console.say(f"{path}: of a smoke run, which has learned nothing")
    member = Member(str(path), model.to(device), about)
    return member, {"student": member.name, "view": about.evaluation, "smoke": smoke}


def _images(path: Path, counted: Sequence[str]) -> Mapping[int, int]:
    """Label -> training images: of the shards that were given, else as the run's record says. Raises UserError."""
    if counted:
        return images_of_classes(expand(counted))
    recorded = folder.about(path.parent).get("images")
    if isinstance(recorded, dict) and all(k.isdecimal() and isinstance(n, int) for k, n in recorded.items()):
        return {int(label): count for label, count in recorded.items()}
    raise UserError(
        f"{path.parent / folder.ABOUT}: does not say how many training images each class had; give the shards that it "
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


def percent(value: float | None) -> str:
    """A figure for people; a dash where there is none."""
    return "-" if value is None else f"{value:.2f}"


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells below each other: the first column to the left, the others to the right."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


# ---------------------------------------------------------------------------------------------- frozen features


def knn(path: Path, patterns: Sequence[str], part: Part, projected: int, device: str) -> Said:
    """k-NN accuracies for each k."""
    bank, asked, classes, result = _features(path, patterns, part, device, class_feature, projected)
    result["knn"] = {}
    for k, places in nearest.places(bank, asked, nearest.usable(len(bank.labels)), classes).items():
        told = figures(asked.labels.cpu(), places.cpu(), classes)
        result["knn"][str(k)] = {"top1": told["top1"], "top5": told["top5"]}
    rows = [("k", "top-1, %", "top-5, %")]
    rows += [(k, percent(told["top1"]), percent(told["top5"])) for k, told in result["knn"].items()]
    return result, [*columns(rows), _of(result)]


def probe(path: Path, patterns: Sequence[str], part: Part, projected: int, lr: float | None, device: str) -> Said:
    """The accuracy of a linear probe, at the learning rate that is best on held-out training samples."""
    bank, asked, classes, result = _features(path, patterns, part, device, probe_feature, projected)
    console = Console()
    console.start("fitting", linear.EPOCHS * (2 if lr is None else 1))
    try:
        tried = [] if lr else linear.try_rates(bank, classes, seed=part.seed, advance=console.advance)
        chosen = lr or tried[0].lr
        head = linear.heads(bank, classes, [chosen], part.seed, advance=console.advance)
    finally:
        console.stop()
    places = places_of(linear.logits_of(head, asked.values), asked.labels)
    told = figures(asked.labels.cpu(), places.cpu(), classes)
    result |= {"top1": told["top1"], "top5": told["top5"], "lr": chosen, "epochs": linear.EPOCHS,
               "tried": [vars(one) for one in tried]}  # fmt: skip
    lines = [f"lr {one.lr:g}: top-1 {one.top1:.2f} % on held-out training samples" for one in tried]
    top5 = f", top-5 {told['top5']:.2f} %" if told["top5"] is not None else ""
    return result, [*lines, f"linear probe, lr {chosen:g}: top-1 {told['top1']:.2f} %{top5}", _of(result)]


def _features(
    path: Path, patterns: Sequence[str], part: Part, device: str, read: Reading, projected: int
) -> tuple[Features, Features, int, dict[str, Any]]:
    """Features of the labelled training samples and of the evaluated ones, the number of classes, and what they are."""
    urls, train = only_set_of(patterns), with_samples(expand(part.shards), Console().say)
    names = classes_of([*train, *urls])  # raises where their lists differ
    where, console = pick_device(device), Console()
    member, result = opened(path, where, console)
    model, about = member.model, member.about
    text = feature_text(model, read)
    if projected:
        read, text = inside.reading(path, model, projected)
    mine = labelled(train, urls, part.share, part.seed)
    if part.listing is not None:
        mine.write(part.listing)
    result |= {"features": text, "projected": projected, "train": _train(mine, part)}
    _say_labelled(mine, part, console)
    console.start("looking", len(mine.rows) + sum(len(cached_index(url)) for url in urls))
    try:
        bank = features_of(model, about, train, read, chosen=mine.chosen, device=where, advance=console.advance)
        asked = features_of(model, about, urls, read, device=where, advance=console.advance)
    finally:
        console.stop()
    highest = int(torch.cat([bank.labels, asked.labels]).max())
    if names and highest >= len(names):
        raise UserError(
            f"there is a label {highest}, and classes.json lists {len(names)} classes; pack the shards again"
        )
    result["samples"], result["width"] = len(asked.labels), bank.values.shape[1]
    return bank, asked, len(names) if names else highest + 1, result


def _train(mine: Labelled, part: Part) -> dict[str, Any]:
    listing = str(part.listing) if part.listing else None
    return {
        "samples": len(mine.rows), "part": part.share, "seed": part.seed, "left_out": mine.left_out,
        "sha256": mine.digest, "list": listing,
    }  # fmt: skip


def _say_labelled(mine: Labelled, part: Part, console: Console) -> None:
    if mine.left_out:
        console.say(f"{mine.left_out} training image(s) are evaluated too; they are left out of what is learned from")
    if part.share < 1:
        written = part.listing or "not written down (--list F)"
        console.say(f"{len(mine.rows):,} labelled samples ({100 * part.share:g} %, seed {part.seed}): {written}")


def _of(result: Mapping[str, Any]) -> str:
    return (
        f"{result['features']}, {result['width']} numbers; {result['train']['samples']} training samples, "
        f"{result['samples']} evaluated ({result['view']})"
    )
