"""Honest timings: contenders take turns, so that a machine that slows down slows all of them; medians count."""

from __future__ import annotations

import operator
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Turns = Mapping[str, Sequence[float]]  # contender -> seconds of each turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A median, and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Median and quartiles of at least one value."""
        if len(values) == 1:
            return cls(median=values[0], low=values[0], high=values[0])
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median=middle, low=low, high=high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One measure: a ratio, the bar that it is to reach on two cores, and what it is made of.

    Attributes:
        number: of the measure.
        case: what was measured.
        words: what is divided by what.
        ratio: of turns that stood beside each other.
        turns: how many.
        about: seconds, rates and the like, plain data.
        bar: the least, or where `most` the largest, ratio that is good; None where there is none.
        most: see `bar`.
    """

    number: int
    case: str
    words: str
    ratio: Spread
    turns: int
    about: dict[str, object]
    bar: float | None = None
    most: bool = False

    @property
    def reached(self) -> bool | None:
        """Whether the bar is reached."""
        good = operator.le if self.most else operator.ge
        return None if self.bar is None else good(self.ratio.median, self.bar)


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes on the wall's clock."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def cpu_seconds(call: Callable[[], object], samples: int = 1) -> float:
    """What a call takes of this process's cores for each of so many samples, all threads together."""
    began = time.process_time()
    call()
    return (time.process_time() - began) / samples


def interleaved(contenders: Mapping[str, Callable[[], float]], turns: int, warm: int = 1) -> dict[str, list[float]]:
    """Contender -> what each of its turns gave; one after another in each turn, the first `warm` are thrown away."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(warm + turns):
        for name, measure in contenders.items():
            times[name].append(measure())
    return {name: values[warm:] for name, values in times.items()}


def ratios(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Ratios of adjacent turns."""
    return Spread.of([a / b for a, b in zip(above, below, strict=True)])
