"""The demo's table says of each gain whether so few seeds can tell it from chance; a process that dies is told."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from pipeline.console import Console
from pipeline.demo.run import _lines, _trained
from storage.errors import UserError

COUNTS = {"all": 1347, "tenth": 134, "val": 450}
SCRATCH = [60.0, 62.0, 64.0]


def verdict(gains: list[float]) -> str:
    """What the table says of a recipe with these gains over scratch."""
    taught = [one + gain for one, gain in zip(SCRATCH, gains, strict=True)]
    lines = _lines({"scratch": SCRATCH, "aal": taught}, {"cnn": 98.0}, COUNTS, 1.0, [Path("curves.png")])
    (line,) = (line for line in lines if line.startswith("aal "))
    return line.rpartition("   ")[2]


@pytest.mark.parametrize(
    ("gains", "says"),
    [
        ([30.0, 31.0, 32.0], "+31.0 ± 0.6"),
        ([-30.0, -31.0, -32.0], "-31.0 ± 0.6"),
        ([1.0, -2.0, 2.5], "+0.5 ± 1.3: may be chance"),
        ([2.0, 5.0, 8.0], "+5.0 ± 1.7: may be chance"),  # 2.9 standard errors
        ([3.0, 5.0, 7.0], "+5.0 ± 1.2"),  # 4.33 of them; of three seeds 4.30 are needed
        ([3.0, 3.0, 3.0], "+3.0 ± 0.0"),
        ([0.0, 0.0, 0.0], "+0.0 ± 0.0: may be chance"),
    ],
)
def test_a_gain_that_three_seeds_cannot_tell_from_chance_is_called_so(gains: list[float], says: str) -> None:
    pytest.importorskip("scipy")
    assert verdict(gains) == says


def doomed() -> float:
    """A training that the kernel ends."""
    os.kill(os.getpid(), signal.SIGKILL)
    return 0.0


def test_a_process_of_the_demo_that_is_killed_is_told() -> None:
    with pytest.raises(UserError, match=r"^a process that trained for the demo died: .* memory ran out .* again$"):
        _trained({"doomed": doomed}, Console())
