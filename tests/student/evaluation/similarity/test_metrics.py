"""Known answers of divergence, of pairings of heads, and of CKA."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")

from scipy.spatial.distance import jensenshannon

from student.evaluation.similarity.metrics import Divergences, LinearCKA, divergence, paired
from tests.typed import present


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).mul(3).softmax(-1)


def test_divergence_is_that_of_scipy_zero_of_equal_rows_and_ln_2_of_rows_that_share_nothing():
    p, q = rows(2, 5, 7), rows(2, 5, 7).flip(-1)
    found = divergence(p.double(), q.double()).numpy()
    assert np.allclose(found, jensenshannon(p.double().numpy(), q.double().numpy(), axis=-1) ** 2)
    assert torch.equal(divergence(p, p), torch.zeros(2, 5))
    one = torch.eye(7)
    assert torch.allclose(divergence(one[0], one[1]), torch.tensor(math.log(2)))
    assert divergence(one[0], one[0]) == 0, "0 log 0 is 0"


def told(mine: torch.Tensor, theirs: torch.Tensor) -> dict[str, Any]:
    kept = Divergences()
    for some in (slice(0, 3), slice(3, None)):  # images in pieces
        kept.add(mine[some], theirs[some])
    return kept.by_layer()[0]


def test_heads_in_another_order_are_the_same_under_all_pairings_but_the_direct_one():
    mine = rows(8, 1, 6, 5, 5)
    found = told(mine, mine[:, :, [3, 0, 1, 5, 2, 4]])
    assert found["direct"] > 0.05
    assert [found[name] for name in ("bipartite", "min", "averaged")] == pytest.approx([0, 0, 0], abs=1e-7)
    assert all(value == 0 for value in told(mine, mine).values())


@pytest.mark.parametrize("seed", range(5))
def test_min_is_below_bipartite_is_below_direct_and_all_below_ln_2(seed):
    torch.manual_seed(seed)
    mine, theirs = torch.randn(2, 8, 1, 6, 5, 5).mul(4).softmax(-1)
    found = told(mine, theirs)
    assert 0 < found["min"] <= found["bipartite"] <= found["direct"] < math.log(2)
    assert 0 < found["averaged"] < found["direct"], "divergence is convex"


def test_fewer_heads_are_paired_as_far_as_they_go():
    matrix = torch.tensor([[0.3, 0.1, 0.5], [0.2, 0.15, 0.6]])
    assert paired(matrix) == pytest.approx({"direct": None, "bipartite": (0.1 + 0.2) / 2, "min": (0.1 + 0.15) / 2})
    assert paired(matrix.T)["min"] == pytest.approx((0.2 + 0.1 + 0.5) / 3)


def aligned(x: torch.Tensor, y: torch.Tensor) -> float | None:
    kept = LinearCKA()
    for some in (slice(0, 17), slice(17, None)):
        kept.add(x[some], y[some])
    return kept.value()


def test_cka_is_one_for_rotated_shifted_and_scaled_features_and_is_that_of_gram_matrices():
    torch.manual_seed(0)
    x, y = torch.randn(60, 9) + 5, torch.randn(60, 4)
    y = y + x[:, :4]
    turn = torch.linalg.qr(torch.randn(9, 9)).Q
    assert aligned(x, x) == pytest.approx(1)
    assert aligned(x, 3 * x @ turn - 2) == pytest.approx(1, abs=1e-6)
    assert present(aligned(x, x * torch.linspace(0.1, 5, 9))) < 0.9, "not for stretched ones"
    center = torch.eye(60).double() - 1 / 60
    k, m = (center @ (a.double() @ a.double().T) @ center for a in (x, y))
    assert aligned(x, y) == pytest.approx(float((k * m).sum() / (k.norm() * m.norm())), rel=1e-5)
    assert present(aligned(torch.randn(5000, 3), torch.randn(5000, 3))) < 0.01
    assert aligned(x, torch.full((60, 3), 0.1)) is None, "what never changes is like nothing"
    little = 1 + 1e-4 * torch.randn(60, 9)
    assert aligned(little, little) == pytest.approx(1), "however little it changes"
