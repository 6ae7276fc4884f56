"""Which training samples have labels where frozen features are evaluated: all, or a class-balanced fraction."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from storage.errors import UserError
from storage.objects.atomic import atomic_write
from storage.objects.json_record import digest_of
from storage.shards.index import cached_index, require_labels
from storage.shards.stratify import stratified_sample


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelSubset:
    """Samples with labels.

    Attributes:
        urls: the shards.
        chosen: sorted indices of the samples that count, of each shard.
        rows: (shard id, key, label) of each of them, in order: what is written down.
        left_out: how many were left out because their images are evaluated too.
    """

    urls: tuple[str, ...]
    chosen: tuple[np.ndarray, ...]
    rows: tuple[tuple[str, str, int], ...]
    left_out: int

    @property
    def digest(self) -> str:
        """Sha256 of the list, in hex."""
        return digest_of([list(row) for row in self.rows])

    def write(self, path: Path) -> None:
        """The list as a CSV with the columns shard, key and label, whole or not at all."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([("shard", "key", "label"), *self.rows])
        with atomic_write(path) as temporary:
            temporary.write_text(text.getvalue(), encoding="utf-8")


def label_subset(urls: Sequence[str], evaluated: Sequence[str], *, fraction: float = 1.0, seed: int = 0) -> LabelSubset:
    """The samples of training shards that have labels.

    A fraction is class-balanced: the samples that `pipeline pack --fraction` keeps of the same shards with the same
    seed. An image that is also evaluated never counts, whatever its key is.

    Args:
        urls: training shards.
        evaluated: the shards that are evaluated.
        fraction: the part of each class, at least one sample.
        seed: of the choice.

    Raises:
        UserError: a missing label, or nothing is left.
    """
    evaluated_digests = {digest for url in evaluated for digest in cached_index(url).digests}
    labels: list[int | None] = []
    for url in urls:
        index = cached_index(url)
        require_labels(url, index)
        labels += index.labels
    drawn = stratified_sample(labels, fraction, seed) if fraction < 1 else range(len(labels))
    mask = np.zeros(len(labels), bool)
    mask[list(drawn)] = True
    chosen, rows, left_out, before = [], [], 0, 0
    for url in urls:
        index = cached_index(url, trust=True)
        drawn_here = mask[before : before + len(index)].nonzero()[0]
        before += len(index)
        kept = [int(i) for i in drawn_here if index.digests[i] not in evaluated_digests]
        left_out += len(drawn_here) - len(kept)
        chosen.append(np.array(kept, np.int64))
        rows += [(index.id, index.keys[i], int(index.labels[i] or 0)) for i in kept]
    if not rows:
        raise UserError(
            f"{urls[0]}: every labelled image of the training shards is evaluated too, so nothing is left to learn "
            "from; give the shards that the student was trained on: --train-shards"
        )
    return LabelSubset(urls=tuple(urls), chosen=tuple(chosen), rows=tuple(rows), left_out=left_out)


def images_of_classes(urls: Sequence[str]) -> Counter[int]:
    """Label -> how many images of shards have it. Raises UserError: a missing label."""
    images: Counter[int] = Counter()
    for url in urls:
        index = cached_index(url)
        require_labels(url, index)
        images.update(label for label in index.labels if label is not None)
    return images
