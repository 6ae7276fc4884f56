"""Class-balanced parts of samples, by seed: the same part wherever it is asked for."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from storage.rng import generator

if TYPE_CHECKING:
    from collections.abc import Sequence


def stratified_sample(
    labels: Sequence[int | None], fraction: float, seed: int, what: str = "fraction", rest: int = 0
) -> set[int]:
    """The indices of a class-balanced part of some samples.

    At least one of each class is in the part, but at least `rest` of each are not.

    Args:
        labels: of the samples, in their order.
        fraction: the part of each class.
        seed: of the choice.
        what: what the part is for; parts for different things are drawn apart.
        rest: 0 or 1.
    """
    by_class: dict[int | None, list[int]] = defaultdict(list)
    for i, label in enumerate(labels):
        by_class[label].append(i)
    chosen: set[int] = set()
    for label, indices in by_class.items():
        count = min(max(round(len(indices) * fraction), 1), len(indices) - rest)
        order = generator("pack", what, seed, label).permutation(len(indices))
        chosen.update(indices[int(j)] for j in order[:count])
    return chosen
