"""Values of every kind that codecs are tried on."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

CODECS = ("f32", "f16", "u8")

SHAPE = (5, 3, 4, 4)  # samples, channels, grid, grid

KINDS = {
    "normal": lambda rng: rng.normal(size=SHAPE),
    "positive": lambda rng: np.maximum(rng.normal(size=SHAPE), 0),
    "tiny": lambda rng: rng.normal(size=SHAPE) * 1e-7,
    "subnormal in f32": lambda rng: rng.normal(size=SHAPE) * 1e-40,
    "huge": lambda rng: rng.normal(size=SHAPE).clip(-6, 6) * 1e4,
    "huge above zero": lambda rng: rng.uniform(size=SHAPE) * [0, 1, 1, 1] * 1.6e7,
    "mostly offset": lambda rng: rng.choice([-1, 1]) * 6e4 + rng.normal(size=SHAPE),
    "constant": lambda rng: np.broadcast_to(rng.normal(size=(5, 3, 1, 1)) * 10.0 ** rng.integers(-9, 4), SHAPE),
    "zero": lambda rng: np.zeros(SHAPE),
    "one spike": lambda rng: (rng.permutation(np.prod(SHAPE)) == 0).reshape(SHAPE) * 1e4,
    "a different size each": lambda rng: rng.normal(size=SHAPE) * 10.0 ** rng.integers(-8, 4, (5, 3, 1, 1)),
}

kinds = st.sampled_from(sorted(KINDS))
seeds = st.integers(0, 2**32)


def values_of(kind: str, seed: int = 0) -> np.ndarray:
    return np.ascontiguousarray(KINDS[kind](np.random.default_rng(seed)), np.float32)
