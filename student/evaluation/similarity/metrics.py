"""How like each other two networks are: Jensen-Shannon divergence of attention, linear CKA of features.

Li et al., "On the Surprising Effectiveness of Attention Transfer for Vision Transformers", appendix B.3 (divergence of
heads), and Kornblith et al., "Similarity of Neural Network Representations Revisited" (CKA).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from storage.errors import UserError

ROUNDING = 1e-12  # of sums: what is left of columns that never change


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence of rows `[…, N]` that sum to one, by the natural logarithm: `[…]`, at most ln 2."""
    middle = ((p + q) / 2).clamp_min(torch.finfo(p.dtype).tiny)
    return (torch.xlogy(p, p / middle) + torch.xlogy(q, q / middle)).sum(-1) / 2


class Divergences:
    """Mean divergences of all heads of a layer of the student with all of the teacher's, over images and queries."""

    def __init__(self) -> None:
        self.heads = self.averaged = torch.zeros((), dtype=torch.float64)  # sums over images
        self.images = 0

    def add(self, student: Tensor, teacher: Tensor) -> None:
        """Take images in: rows `[B, L, H, Q, N]` of the student, with another H of the teacher."""
        each = [divergence(student, teacher[:, :, h : h + 1]).mean(-1).sum(0) for h in range(teacher.shape[2])]
        self.heads = self.heads + torch.stack(each, -1).double().cpu()
        self.averaged = self.averaged + divergence(student.mean(2), teacher.mean(2)).mean(-1).sum(0).double().cpu()
        self.images += len(student)

    def by_layer(self) -> list[dict[str, float | None]]:
        """For each pair of layers the divergence under each pairing of heads; `direct` only of as many heads."""
        means = zip(self.heads / self.images, self.averaged / self.images, strict=True)
        return [{**paired(matrix), "averaged": float(averaged)} for matrix, averaged in means]


def assignment() -> Any:
    """What pairs heads one to one. Raises UserError where scipy is missing."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise UserError("pairing heads needs scipy: pip install -c constraints.txt -e '.[cpu,demo]'") from None
    return linear_sum_assignment


def paired(matrix: Tensor) -> dict[str, float | None]:
    """Divergence under the pairings of appendix B.3 that pair heads.

    Args:
        matrix: mean divergences `[H_s, H_t]`.

    Returns:
        direct: head i with head i; None where the numbers differ. bipartite: each head with one of its own, so that
        the sum is smallest; with other numbers, as many as both have. min: each of the student's with its nearest.
    """
    direct = float(matrix.diagonal().mean()) if matrix.shape[0] == matrix.shape[1] else None
    bipartite = float(matrix[assignment()(matrix.numpy())].mean())
    return {"direct": direct, "bipartite": bipartite, "min": float(matrix.amin(1).mean())}


class LinearCKA:
    """Linear CKA of two features of the same rows, ‖X̃ᵀỸ‖² / (‖X̃ᵀX̃‖ ‖ỸᵀỸ‖) with centered columns, from sums."""

    def __init__(self) -> None:
        self.rows = 0
        self.sums: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take rows in: `[n, D]` and `[n, D']`."""
        x, y = x.double(), y.double()
        new = [x.sum(0), y.sum(0), x.T @ y, x.T @ x, y.T @ y]
        self.sums = [a + b for a, b in zip(self.sums, new, strict=True)] if self.sums else new
        self.rows += len(x)

    def value(self) -> float | None:
        """In [0, 1]; None where one side is the same for all rows."""
        x, y, xy, xx, yy = self.sums
        norm_xy, norm_xx, norm_yy = (
            float((product - torch.outer(a, b) / self.rows).norm())
            for product, a, b in ((xy, x, y), (xx, x, x), (yy, y, y))
        )
        if norm_xx <= ROUNDING * float(xx.norm()) or norm_yy <= ROUNDING * float(yy.norm()):
            return None
        return norm_xy**2 / (norm_xx * norm_yy)
