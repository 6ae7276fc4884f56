"""Random numbers that depend on nothing but their key: NumPy's Philox, keyed by a digest."""

from __future__ import annotations

import hashlib

import numpy as np

from storage.objects import json_record


def generator(*arguments: object) -> np.random.Generator:
    """NumPy's Philox keyed by a digest of the arguments: what is drawn depends on nothing else."""
    key = hashlib.sha256(json_record.canonical(list(arguments))).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
