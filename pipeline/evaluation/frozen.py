"""What `pipeline evaluate knn` and `linear-probe` measure and print."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from pipeline.console import Console
from pipeline.evaluation.common import Evaluated, columns, number, only_set, open_student, progress
from pipeline.evaluation.teacher import TeacherQuery, open_teacher
from storage.errors import UserError
from storage.shards.classes import classes_of
from storage.shards.shard import open_shards
from student.distributed import pick_device
from student.evaluation.class_metrics import ClassMetrics, class_metrics, label_ranks
from student.evaluation.frozen import linear_probe, projector_features
from student.evaluation.frozen.features import class_feature, feature_text, features_of, gathered, probe_feature
from student.evaluation.frozen.knn import knn_ranks, usable
from student.evaluation.frozen.label_subset import LabelSubset, label_subset

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy as np

    from storage.shards.shard import Shard
    from student.evaluation.frozen.features import Features, Reading


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenConfig:
    """What is read of which samples.

    Attributes:
        shards: patterns of the labeled shards to evaluate on.
        train_shards: patterns of the labeled shards to learn from.
        label_fraction: of the training samples, class-balanced.
        listing: a file for the list of the training samples whose labels are used.
        projector_layers: linear layers of the projector that features go through; 0 for the student's own features.
        seed: chooses the labeled samples.
        device: as on the command line.
    """

    shards: Sequence[str]
    train_shards: Sequence[str]
    label_fraction: float
    listing: Path | None
    projector_layers: int
    seed: int
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureReport:
    """Which features were read of which samples.

    Attributes:
        evaluated: which student or teacher.
        features: in words.
        width: numbers of a sample.
        config: what was asked for.
        subset: training samples whose labels are used.
        samples: how many are evaluated.
    """

    evaluated: Evaluated
    features: str
    width: int
    config: FrozenConfig
    subset: LabelSubset
    samples: int

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        config, subset = self.config, self.subset
        train = {
            "samples": len(subset.rows),
            "fraction": config.label_fraction,
            "seed": config.seed,
            "left_out": subset.left_out,
            "sha256": subset.digest,
            "list": str(config.listing) if config.listing else None,
        }
        read = {"features": self.features, "width": self.width, "projector_layers": config.projector_layers}
        return {**asdict(self.evaluated), **read, "train": train, "samples": self.samples}

    def line(self) -> str:
        """One line."""
        return (
            f"{self.features}, {self.width} numbers; {len(self.subset.rows)} training samples, {self.samples} "
            f"evaluated ({self.evaluated.how})"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class KnnReport:
    """Accuracy of k-NN for each k."""

    features: FeatureReport
    knn: dict[int, ClassMetrics]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        by_k = {str(k): {"top1": accuracy.top1, "top5": accuracy.top5} for k, accuracy in self.knn.items()}
        return {**self.features.to_json(), "knn": by_k}

    def lines(self) -> list[str]:
        """A table."""
        rows = [(str(k), number(accuracy.top1), number(accuracy.top5)) for k, accuracy in self.knn.items()]
        return [*columns([("k", "top-1, %", "top-5, %"), *rows]), self.features.line()]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearProbeReport:
    """Accuracy of a linear probe, its learning rate, and those that were tried on held-out training samples."""

    features: FeatureReport
    accuracy: ClassMetrics
    lr: float
    tried: tuple[linear_probe.ProbeTrial, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        result = {"top1": self.accuracy.top1, "top5": self.accuracy.top5, "lr": self.lr, "epochs": linear_probe.EPOCHS}
        return {**self.features.to_json(), **result, "tried": [asdict(trial) for trial in self.tried]}

    def lines(self) -> list[str]:
        """A line for each learning rate that was tried, and the accuracy."""
        tried = [f"lr {one.lr:g}: top-1 {one.top1:.2f} % on held-out training samples" for one in self.tried]
        top5 = f", top-5 {self.accuracy.top5:.2f} %" if self.accuracy.top5 is not None else ""
        return [*tried, f"linear probe, lr {self.lr:g}: top-1 {self.accuracy.top1:.2f} %{top5}", self.features.line()]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Split:
    """Features to learn from and features to evaluate."""

    train: Features
    evaluated: Features
    num_classes: int
    report: FeatureReport

    def accuracy(self, ranks: torch.Tensor) -> ClassMetrics:
        """Accuracy by the ranks of the evaluated samples' labels."""
        return class_metrics(self.evaluated.labels.cpu(), ranks.cpu(), self.num_classes)


def measure_knn(network: Path | TeacherQuery, config: FrozenConfig) -> KnnReport:
    """k-NN accuracies for each k, of a student's file or of a teacher."""
    split = _features(network, config, class_feature)
    ranks_by_k = knn_ranks(split.train, split.evaluated, usable(len(split.train.labels)), split.num_classes)
    return KnnReport(features=split.report, knn={k: split.accuracy(ranks) for k, ranks in ranks_by_k.items()})


def measure_linear_probe(network: Path | TeacherQuery, config: FrozenConfig, lr: float | None) -> LinearProbeReport:
    """The accuracy of a linear probe, by default at the learning rate that is best on held-out training samples."""
    split = _features(network, config, probe_feature)
    train, num_classes, seed = split.train, split.num_classes, config.seed
    with progress("fitting", linear_probe.EPOCHS * (2 if lr is None else 1)) as advance:
        tried = [] if lr else linear_probe.search_learning_rate(train, num_classes, seed=seed, advance=advance)
        chosen = lr or tried[0].lr
        head = linear_probe.heads(train, num_classes, [chosen], seed=seed, advance=advance)
    ranks = label_ranks(linear_probe.logits_of(head, split.evaluated.values), split.evaluated.labels)
    return LinearProbeReport(features=split.report, accuracy=split.accuracy(ranks), lr=chosen, tried=tuple(tried))


def _features(network: Path | TeacherQuery, config: FrozenConfig, read: Reading) -> _Split:
    """Features of the labeled training samples and of the evaluated ones."""
    say = Console().say
    shards, train_shards = only_set(config.shards), open_shards(config.train_shards, say)
    names = classes_of([shard.url for shard in (*train_shards, *shards)])  # raises where their lists differ
    torch_device = pick_device(config.device)
    features: Callable[..., Features]
    if isinstance(network, TeacherQuery):
        own_probe = probe_feature if read is probe_feature else None
        taps, all_shards = ("embedding", "class_token"), [*train_shards, *shards]
        answers = open_teacher(network, taps, all_shards, torch_device, own_probe)
        evaluated: Evaluated = answers.evaluated
        text = answers.text

        def features(
            shards: Sequence[Shard], chosen: Sequence[np.ndarray] | None, advance: Callable[[int], None]
        ) -> Features:
            return gathered(answers.batches(shards, chosen), torch_device, advance)

    else:
        member, evaluated = open_student(network, torch_device)
        text = feature_text(member.model, read)
        if config.projector_layers:
            read, text = projector_features.projector_reading(network, member.model, config.projector_layers)
        features = partial(features_of, member.model, member.about, read=read, device=torch_device)
    subset = label_subset(train_shards, shards, fraction=config.label_fraction, seed=config.seed)
    if config.listing is not None:
        subset.write(config.listing)
    if subset.left_out:
        say(f"{subset.left_out} training image(s) are also evaluated; they are skipped in training")
    if config.label_fraction < 1:
        written = config.listing or "not written (--list F)"
        percent_used = f"{100 * config.label_fraction:g} %"
        say(f"{len(subset.rows):,} labeled samples ({percent_used}, seed {config.seed}): {written}")
    with progress("reading features", len(subset.rows) + sum(map(len, shards))) as advance:
        train = features(shards=train_shards, chosen=subset.chosen, advance=advance)
        tested = features(shards=shards, chosen=None, advance=advance)
    highest = int(torch.cat([train.labels, tested.labels]).max())
    count = len(names) if names else highest + 1
    if highest >= count:
        raise UserError(f"there is a label {highest}, and classes.json lists {count} classes; pack the shards again")
    report = FeatureReport(
        evaluated=evaluated,
        features=text,
        width=train.values.shape[1],
        config=config,
        subset=subset,
        samples=len(tested.labels),
    )
    return _Split(train=train, evaluated=tested, num_classes=count, report=report)
