"""Whether values are constant: equal values that were summed in f32 differ by rounding, which is not to be blown up."""

from __future__ import annotations

ROUNDING = 1e-6  # of the largest magnitude: some units in the last place of f32


def constant(low: float, high: float) -> bool:
    """Whether values between these differ by no more than rounding; false where one is no number."""
    return high - low <= ROUNDING * max(abs(low), abs(high))
