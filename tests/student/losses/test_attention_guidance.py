"""Attention guidance of AttnDistill: its four cases, aggregations, distances, value norms, and their gradients."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from storage.errors import UserError
from student.alignment.attention import weighted
from student.alignment.student_spec import StudentSpec
from student.losses.attention_guidance import AttentionGuidanceConfig, AttentionGuidanceLoss, divergence, squares
from tests.student.alignment.test_matching import given, random_rows
from tests.student.attention import attention_of
from tests.typed import present

if TYPE_CHECKING:
    from student.targets.stored_target import StoredTarget

F64 = torch.float64


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def method(student: StudentSpec, *several: StoredTarget, **settings: Any) -> AttentionGuidanceLoss:
    return AttentionGuidanceLoss("it", AttentionGuidanceConfig(**settings), student, several)


def step(targets: tuple[torch.Tensor, ...], **seen: Any) -> Any:
    return SimpleNamespace(student_taps=SimpleNamespace(attention=attention_of(**seen)), targets=targets)


def attending(layers: int, heads: int, tokens: int, seed: int = 0) -> dict[str, Any]:
    """q, k and v of a student's layers."""
    parts = {
        name: [values(2, heads, tokens, 4, seed=seed + 10 * i + n) for n in range(layers)]
        for i, name in enumerate(("q", "k", "v"))
    }
    return {**parts, "scales": [0.5] * layers}


# ---------------------------------------------------------------------------------------------- which case it is


@pytest.mark.parametrize(
    ("heads", "side", "said"),
    [(3, 4, "case (a): layers 4-4"), (3, 8, "case (b)"), (6, 4, "case (c)"), (6, 8, "case (d)")],
)
def test_the_case_follows_from_heads_and_grids_and_is_said(heads, side, said):
    made = method(StudentSpec(4, heads, side, ("class",)), given("class_row"))
    assert present(made.row).rule.startswith(said)
    assert ("T = 10" in present(made.row).rule) == (heads == 6)
    assert ("4x4 to 8x8 (bicubic, mass kept)" in present(made.row).rule) == (side == 8)
    rows = made.rows.teacher_rows([random_rows(2, 4, 3, 17)])
    assert rows.shape == (2, 1, 3 if heads == 3 else 1, 1 + side * side)
    assert (rows >= 0).all()
    assert torch.allclose(rows.sum(-1), torch.ones(()), atol=1e-6)


def test_heads_may_be_merged_where_there_are_as_many():
    """The ablation's aggregated row of the 12-layer student with six heads."""
    made = method(StudentSpec(4, 3, 4, ("class",)), given("class_row"), heads="log")
    assert present(made.row).rule.startswith("case (c)")
    assert made.rows.teacher_rows([random_rows(2, 4, 3, 17)]).shape == (2, 1, 1, 17)


def test_all_layers_are_an_option():
    made = method(StudentSpec(4, 3, 4, ("class",)), given("class_row"), layers=None)
    assert made.rows.pairs == [(1, 1), (2, 2), (3, 3), (4, 4)]


def test_a_student_without_a_class_token_is_refused_by_name():
    with pytest.raises(UserError, match="it: the student has no class token, so it has no class rows"):
        method(StudentSpec(4, 3, 4, ()), given("class_row"))


# ---------------------------------------------------------------------------------------------- known answers


def test_the_divergence_is_kl_with_the_teacher_first_summed_over_heads():
    teacher, student = values(2, 3, 4, 9).softmax(-1), values(2, 3, 4, 9, seed=1).softmax(-1)
    assert divergence(teacher.log(), teacher).abs() < 1e-15
    assert squares(teacher, teacher) == 0
    by_layer = [F.kl_div(student[:, n].log(), teacher[:, n], reduction="batchmean") for n in range(3)]
    assert torch.isclose(divergence(student.log(), teacher), torch.stack(by_layer).mean())
    once = torch.zeros(1, 1, 1, 197, dtype=F64)
    once[..., 5] = 1
    uniform = torch.full((1, 1, 1, 197), 1 / 197, dtype=F64)
    assert divergence(uniform.log(), once).item() == pytest.approx(math.log(197)), "zeros of the teacher cost nothing"


def test_six_and_three_identical_heads_differ_at_one_temperature_and_not_at_their_own():
    head = values(2, 4, 1, 17).mul(2).softmax(-1)
    target = head.expand(2, 4, 6, 17)
    k = torch.zeros(2, 3, 17, 4, dtype=F64)
    k[..., 0] = head[:, -1].log()  # and every query looks at that alone
    q = torch.zeros_like(k)
    q[..., 0] = 1
    seen = {"q": [q] * 4, "k": [k] * 4, "scales": [1.0] * 4}
    for settings, equal in (({}, False), ({"head_temperature": None}, True), ({"heads": "mean"}, True)):
        made = method(StudentSpec(4, 3, 4, ("class",)), given("class_row", heads=6), **settings)
        found = made(step((target,), **seen))
        assert (found.abs() < 1e-12) if equal else (found > 1e-3)


@pytest.mark.parametrize(("heads", "of"), [("max", torch.amax), ("min", torch.amin)])
def test_largest_and_smallest_heads_are_scaled_to_one(heads, of):
    made = method(StudentSpec(4, 6, 4, ("class",)), given("class_row"), heads=heads)
    target = random_rows(2, 4, 3, 17)
    rows = made.rows.teacher_rows([target])
    expected = of(target[:, -1:], 2, keepdim=True)
    assert torch.allclose(rows, expected / expected.sum(-1, keepdim=True))
    assert "over heads on both sides, rescaled" in present(made.row).rule


def test_values_of_one_norm_weigh_nothing_and_others_do():
    rows = random_rows(2, 3, 9)
    v = F.normalize(torch.randn(2, 3, 9, 4), dim=-1)
    assert torch.allclose(weighted(rows, 7 * v), rows, atol=1e-6)
    silent = v.clone()
    silent[..., 2, :] = 0
    found = weighted(rows, silent)
    assert (found[..., 2] == 0).all()
    assert torch.allclose(found.sum(-1), torch.ones(()))


@pytest.mark.parametrize("taps", [("class_row", "v"), ("q", "k", "v")])
def test_both_sides_are_weighed_before_anything_else(taps):
    """As in the authors' code: where the attention is made, so before grids and heads meet."""
    made = method(StudentSpec(4, 6, 8, ("class",)), *(given(tap, width=4) for tap in taps), value_norm=True)
    assert present(made.row).rule.startswith("case (d)")
    assert present(made.row).rule.endswith("weighted by the norms of values")
    config = AttentionGuidanceConfig(value_norm=True)
    assert present(AttentionGuidanceLoss.requirement("it", config, StudentSpec(4, 6, 8, ("class",)))).taps[0] == (
        "class_row",
        "v",
    )
    assert AttentionGuidanceLoss.student_taps(AttentionGuidanceConfig(value_norm=True)) == {
        "attention",
        "values",
    }
    q, k, v = (values(2, 4, 3, 17, 4, seed=s) for s in range(3))
    rows = (q[..., :1, :] @ k.transpose(-2, -1) * 0.5).softmax(-1)[..., 0, :]
    targets = {"class_row": rows, "q": q, "k": k, "v": v}
    seen = attending(4, 6, 65, seed=5)
    found = made.double()(step(tuple(targets[tap] for tap in taps), **seen))
    mine = (seen["q"][3][:, :, :1] @ seen["k"][3].transpose(-2, -1) * 0.5).softmax(-1)[:, :, 0]
    mine, theirs = (
        one * norms / (one * norms).sum(-1, keepdim=True)
        for one, norms in ((mine, seen["v"][3].norm(dim=-1)), (rows[:, 3], v[:, 3].norm(dim=-1)))
    )
    patches = F.interpolate(theirs[..., 1:].reshape(2, 3, 4, 4), (8, 8), mode="bicubic").clamp_min(0).flatten(2)
    patches = patches / patches.sum(-1, keepdim=True) * theirs[..., 1:].sum(-1, keepdim=True)
    theirs = torch.cat([theirs[..., :1], patches], -1)
    theirs = theirs.clamp_min(1e-6 * theirs.amax(-1, keepdim=True))  # for zeros that the resizing leaves
    mine, theirs = (one.pow(1 / 10).prod(1) for one in (mine, theirs))  # Eq. 9 to 11 at T = 10
    mine, theirs = (one / one.sum(-1, keepdim=True) for one in (mine, theirs))
    assert torch.isclose(found, F.kl_div(mine.log(), theirs, reduction="batchmean"), rtol=1e-5)


# ---------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("loss", ["kl", "mse"])
@pytest.mark.parametrize("heads", ["auto", "mean", "max", "min"])
def test_input_gradients_down_to_q_k_and_v_of_the_last_layer_alone(loss, heads):
    settings = {"distance": loss, "heads": heads, "value_norm": True}
    student = StudentSpec(2, 2, 2, ("class", "distillation"))
    made = method(student, given("class_row", side=3), given("v", side=3, width=4), **settings).double()
    targets = (values(2, 4, 3, 10).softmax(-1), values(2, 4, 3, 10, 4, seed=1))
    seen = attending(2, 2, 6, seed=2)
    q, k, v = (seen[name][1].requires_grad_() for name in ("q", "k", "v"))

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        parts = {"q": [seen["q"][0], q], "k": [seen["k"][0], k], "v": [seen["v"][0], v], "scales": seen["scales"]}
        return made(step(targets, **parts))

    assert gradcheck(run, (q, k, v))
    run(q, k, v).backward()
    assert seen["q"][0].grad is None
    assert (q.grad[:, :, 1:] == 0).all(), "only the class query is looked at"
    assert k.grad[:, :, 1].abs().max() < 1e-12, "a token that the teacher lacks has no say"


def test_a_student_that_attends_as_its_teacher_does_is_at_the_minimum():
    made = method(StudentSpec(2, 3, 4, ("class",)), given("class_row", depth=2), layers=None).double()
    seen = attending(2, 3, 17)
    rows = [
        (q[:, :, :1] @ k.transpose(-2, -1) * 0.5).softmax(-1)[:, :, 0]
        for q, k in zip(seen["q"], seen["k"], strict=True)
    ]
    q = seen["q"][1].requires_grad_()
    loss = made(step((torch.stack(rows, 1),), **seen))
    loss.backward()
    assert loss < 1e-12
    assert q.grad.abs().max() < 1e-12
