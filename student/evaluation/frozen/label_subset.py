"""Which training samples have labels where frozen features are evaluated: all, or a class-balanced fraction."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from storage.errors import UserError, setting
from storage.objects.atomic import atomic_write
from storage.objects.json_record import digest_of
from storage.shards.shard import Shard, require_labels
from storage.shards.stratify import stratified_sample

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelSubset:
    """Samples with labels.

    Attributes:
        chosen: sorted indices of the samples that count, of each shard.
        rows: (shard id, key, label) of each of them, in order: what is written down.
        left_out: how many were left out because their images are evaluated too.
    """

    chosen: tuple[np.ndarray, ...]
    rows: tuple[tuple[str, str, int], ...]
    left_out: int

    @property
    def digest(self) -> str:
        """Sha256 of the list, in hex."""
        return digest_of([list(row) for row in self.rows])

    def write(self, path: Path) -> None:
        """The list as a CSV with the columns shard, key and label, whole or not at all."""
        with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([("shard", "key", "label"), *self.rows])


def label_subset(
    shards: Sequence[Shard], evaluated: Sequence[Shard], *, fraction: float = 1.0, seed: int = 0
) -> LabelSubset:
    """The samples of training shards that have labels.

    A fraction is class-balanced: the samples that `pack` keeps of the same shards with the same fraction and
    seed. An image that is also evaluated never counts, whatever its key is.

    Args:
        shards: training shards.
        evaluated: the shards that are evaluated.
        fraction: the part of each class, at least one sample.
        seed: of the choice.

    Raises:
        UserError: a missing label, or nothing is left.
    """
    evaluated_digests = {digest for shard in evaluated for digest in shard.index.digests}
    labels: list[int | None] = []
    for shard in shards:
        require_labels(shard)
        labels += shard.index.labels
    drawn = stratified_sample(labels, fraction, seed) if fraction < 1 else range(len(labels))
    chosen, rows, before = [], [], 0
    for shard in shards:
        index = shard.index
        digests = enumerate(index.digests)
        samples = [i for i, digest in digests if before + i in drawn and digest not in evaluated_digests]
        before += len(index)
        chosen.append(np.array(samples, np.int64))
        rows += [(index.id, index.keys[i], int(index.labels[i] or 0)) for i in samples]
    if not rows:
        raise UserError(
            f"{shards[0].url}: every labeled image of the training shards is evaluated too, so nothing is left to "
            "learn from",
            hint=f"Give the shards that the student was trained on: {setting('train_shards', 'SHARDS')}",
        )
    return LabelSubset(chosen=tuple(chosen), rows=tuple(rows), left_out=len(drawn) - len(rows))


def images_of_classes(shards: Sequence[Shard]) -> Counter[int]:
    """Label -> how many images of shards have it. Raises UserError: a missing label."""
    images: Counter[int] = Counter()
    for shard in shards:
        require_labels(shard)
        images.update(label for label in shard.index.labels if label is not None)
    return images
