"""`pipeline bench`: its measures at a small size, and the price of a stored target at the real one."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest
import torch

from pipeline.bench import PARTS, bench, lines, timing
from pipeline.bench.timing import Measure, Spread, interleaved, ratios
from pipeline.console import Console

if TYPE_CHECKING:
    from pathlib import Path


def test_turns_are_taken_one_after_another_and_the_first_are_thrown_away() -> None:
    order: list[str] = []

    def one(name: str) -> float:
        order.append(name)
        return float(len(order))

    found = interleaved({"a": lambda: one("a"), "b": lambda: one("b")}, turns=2, warm=1)
    assert order == ["a", "b"] * 3
    assert found == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_a_ratio_is_of_turns_that_stood_beside_each_other() -> None:
    slow, fast = [2.0, 20.0, 2.0, 2.0], [1.0, 10.0, 1.0, 1.0]  # the machine was busy in the second turn
    assert ratios(slow, fast) == Spread(median=2.0, low=2.0, high=2.0)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(median=3.0, low=2.0, high=4.0)
    assert Spread.of([7.0]) == Spread(median=7.0, low=7.0, high=7.0)


@pytest.mark.parametrize(
    ("ratio", "bar", "most", "reached"),
    [
        (0.91, 0.9, False, True),
        (0.89, 0.9, False, False),
        (1.09, 1.1, True, True),
        (1.11, 1.1, True, False),
        (5.0, None, False, None),
    ],
)
def test_a_bar_is_reached_from_the_right_side(ratio, bar, most, reached) -> None:
    spread = Spread(median=ratio, low=ratio, high=ratio)
    measure = Measure(number=1, case="case", words="a ÷ b", ratio=spread, turns=1, about={}, bar=bar, most=most)
    assert measure.reached is reached


def test_seconds_of_the_wall_and_of_the_cores() -> None:
    def works() -> None:
        sum(range(2_000_000))

    def sleeps() -> None:
        time.sleep(0.05)

    assert timing.seconds(sleeps) >= 0.05 > timing.cpu_seconds(sleeps)
    assert timing.cpu_seconds(works) > 0


@pytest.mark.slow
def test_reading_is_measured_and_nothing_is_left(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    result = bench(["stream"], [], Console(), device="cpu", turns=1, quick=True, folder=tmp_path)
    assert torch.get_num_threads() == threads, "what computes next in this process computes as before"
    assert [(row["number"], row["bar"]) for row in result["measures"]] == [(5, 0.9), (5, None), (6, None), (6, None)]
    for row in result["measures"]:
        assert 0 < row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
    assert not list(tmp_path.iterdir())
    json.dumps(result)
    text = "\n".join(lines(result))
    assert "(5) the joined stream ÷ without targets" in text
    assert "bar ≥ 0.9" in text


@pytest.mark.long
def test_everything_is_measured(tmp_path: Path) -> None:
    result = bench(PARTS, [], Console(), device="cpu", turns=1, quick=True, folder=tmp_path)
    assert {row["number"] for row in result["measures"]} == {1, 2, 3, 4, 5, 6}
    for row in result["measures"]:  # what the ratios are is the machine's matter, and the bars say what is enough
        assert 0 < row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]


@pytest.mark.long
@pytest.mark.gpu
def test_everything_is_measured_on_a_gpu(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    result = bench(
        ["precompute", "torch", "train", "live"], [], Console(), device="cuda", turns=1, quick=True, folder=tmp_path
    )
    assert {row["number"] for row in result["measures"]} == {1, 2, 3, 4}
