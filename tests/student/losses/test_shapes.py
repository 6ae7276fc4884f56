"""The suite holds tensors against the shapes that losses and alignment state."""

from __future__ import annotations

import jaxtyping
import pytest
import torch

from student.losses import cross_entropy, deit


def test_tensors_of_other_shapes_are_refused() -> None:
    logits = torch.zeros(4, 3)
    deit.soft(logits, logits)
    with pytest.raises(jaxtyping.TypeCheckError, match="teacher"):
        deit.soft(logits, logits[:, :2])  # B and K are those of the student's logits
    labels, weights = torch.zeros(4, dtype=torch.int64), torch.zeros(4)
    cross_entropy.cross_entropy(logits, labels, labels, weights)
    with pytest.raises(jaxtyping.TypeCheckError, match="mix_labels"):
        cross_entropy.cross_entropy(logits, labels, labels[:3], weights)
