"""k-NN and linear probes, for the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.console import Console
from pipeline.evaluation.common import Said, columns, only_set_of, opened, percent
from storage.errors import UserError
from storage.shards.classes import classes_of
from storage.shards.index import cached_index, with_samples
from storage.shards.patterns import expand
from student.distributed import pick_device
from student.evaluation.class_metrics import class_metrics, label_ranks
from student.evaluation.frozen import knn as nearest
from student.evaluation.frozen import linear_probe as linear
from student.evaluation.frozen import projector_features
from student.evaluation.frozen.features import (
    Features,
    Reading,
    class_feature,
    feature_text,
    features_of,
    probe_feature,
)
from student.evaluation.frozen.label_subset import LabelSubset, label_subset


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelFraction:
    """Which training samples are labeled: patterns of shards, the fraction, its seed, and where to list them."""

    shards: Sequence[str]
    fraction: float
    seed: int
    listing: Path | None


# ---------------------------------------------------------------------------------------------- frozen features


def measure_knn(
    path: Path, patterns: Sequence[str], part: LabelFraction, *, projector_layers: int, device: str
) -> Said:
    """k-NN accuracies for each k."""
    bank, asked, classes, result = _features(
        path, patterns, part, class_feature, projector_layers=projector_layers, device=device
    )
    result["knn"] = {}
    for k, places in nearest.places(bank, asked, nearest.usable(len(bank.labels)), classes).items():
        told = class_metrics(asked.labels.cpu(), places.cpu(), classes)
        result["knn"][str(k)] = {"top1": told["top1"], "top5": told["top5"]}
    rows = [("k", "top-1, %", "top-5, %")]
    rows += [(k, percent(told["top1"]), percent(told["top5"])) for k, told in result["knn"].items()]
    return result, [*columns(rows), _of(result)]


def measure_linear_probe(
    path: Path, patterns: Sequence[str], part: LabelFraction, *, lr: float | None, projector_layers: int, device: str
) -> Said:
    """The accuracy of a linear probe, at the learning rate that is best on held-out training samples."""
    bank, asked, classes, result = _features(
        path, patterns, part, probe_feature, projector_layers=projector_layers, device=device
    )
    console = Console()
    console.start("fitting", linear.EPOCHS * (2 if lr is None else 1))
    try:
        tried = [] if lr else linear.search_learning_rate(bank, classes, seed=part.seed, advance=console.advance)
        chosen = lr or tried[0].lr
        head = linear.heads(bank, classes, [chosen], part.seed, advance=console.advance)
    finally:
        console.stop()
    places = label_ranks(linear.logits_of(head, asked.values), asked.labels)
    told = class_metrics(asked.labels.cpu(), places.cpu(), classes)
    result |= {"top1": told["top1"], "top5": told["top5"], "lr": chosen, "epochs": linear.EPOCHS,
               "tried": [vars(one) for one in tried]}  # fmt: skip
    lines = [f"lr {one.lr:g}: top-1 {one.top1:.2f} % on held-out training samples" for one in tried]
    top5 = f", top-5 {told['top5']:.2f} %" if told["top5"] is not None else ""
    return result, [*lines, f"linear probe, lr {chosen:g}: top-1 {told['top1']:.2f} %{top5}", _of(result)]


def _features(
    path: Path, patterns: Sequence[str], part: LabelFraction, read: Reading, *, projector_layers: int, device: str
) -> tuple[Features, Features, int, dict[str, Any]]:
    """Features of the labelled training samples and of the evaluated ones, the number of classes, and what they are."""
    urls, train = only_set_of(patterns), with_samples(expand(part.shards), Console().say)
    names = classes_of([*train, *urls])  # raises where their lists differ
    where, console = pick_device(device), Console()
    member, result = opened(path, where, console)
    model, about = member.model, member.about
    text = feature_text(model, read)
    if projector_layers:
        read, text = projector_features.reading(path, model, projector_layers)
    mine = label_subset(train, urls, part.fraction, part.seed)
    if part.listing is not None:
        mine.write(part.listing)
    result |= {"features": text, "projector_layers": projector_layers, "train": _train(mine, part)}
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


def _train(mine: LabelSubset, part: LabelFraction) -> dict[str, Any]:
    listing = str(part.listing) if part.listing else None
    return {
        "samples": len(mine.rows), "part": part.fraction, "seed": part.seed, "left_out": mine.left_out,
        "sha256": mine.digest, "list": listing,
    }  # fmt: skip


def _say_labelled(mine: LabelSubset, part: LabelFraction, console: Console) -> None:
    if mine.left_out:
        console.say(f"{mine.left_out} training image(s) are evaluated too; they are left out of what is learned from")
    if part.fraction < 1:
        written = part.listing or "not written down (--list F)"
        console.say(f"{len(mine.rows):,} labelled samples ({100 * part.fraction:g} %, seed {part.seed}): {written}")


def _of(result: Mapping[str, Any]) -> str:
    return (
        f"{result['features']}, {result['width']} numbers; {result['train']['samples']} training samples, "
        f"{result['samples']} evaluated ({result['view']})"
    )
