"""Rows with entries far below what f32 and floors resolve: losses and gradients are those of f64.

The reference multiplies, merges and divides plain probabilities in f64, where a gap of 700 is no trouble, and takes
their logarithms; the code computes logarithms from scores in f32.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from storage.store.codecs import Codec
from student.alignment.attention import AttentionAligner
from student.alignment.student_spec import StudentSpec
from student.losses import advit
from student.losses.base import LossInputs
from student.losses.registry import LOSSES
from student.targets.stored_target import StoredTarget
from tests.student.alignment.test_matching import given
from tests.student.attention import attention_of
from tests.typed import grad

if TYPE_CHECKING:
    from collections.abc import Callable

ROLES = ("class", "distillation")


def loss_of(
    name: str, student: StudentSpec, several: list[StoredTarget], targets: list[Tensor], seen: Any, **settings: Any
):
    made = LOSSES[name]("it", LOSSES[name].Config(**settings), student, several)
    batch = len(targets[0])
    labels = torch.zeros(batch, dtype=torch.int64)  # these losses read none
    inputs = LossInputs(
        logits=torch.zeros(batch, 1),
        labels=labels,
        mix_labels=labels,
        mix_weights=torch.zeros(batch),
        student_taps=seen,
        targets=tuple(targets),
    )
    return made(inputs)


# ---------------------------------------------------------------------------------------------- known answers


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("attention", {}),
        ("head_specific", {"distance": "ce"}),
        ("head_specific", {"distance": "kl"}),
        ("guidance", {}),
        *[("guidance", {"heads": rule}) for rule in ("mean", "sum", "max", "min")],
        ("guidance", {"heads": "log", "head_temperature": 1}),
        ("advit", {"distance": "ce", "kl_input": "log-prob", "heads": None}),
        ("advit", {"distance": "kl", "kl_input": "log-prob", "heads": "mean"}),
    ],
)
@pytest.mark.parametrize("gap", [1.0, 40.0, 90.0])
def test_a_gap_costs_what_it_is_and_is_closed(method, settings, gap):
    """Scores (gap, 0, −gap) of each query, and a teacher that looks at the second key alone."""
    student = StudentSpec(1, 1, 1, ROLES)  # one patch: three tokens
    target = torch.eye(3)[1].expand(1, 1, 1, 3, 3)
    scores = torch.tensor([gap, 0.0, -gap])
    if method == "advit":  # patches alone, so the tokens that are compared are a 2x2 grid
        student, target = StudentSpec(1, 1, 2, ("class",)), torch.eye(5)[2].expand(1, 1, 1, 5, 5)
        scores = torch.tensor([0.0, gap, 0.0, -gap, -gap])
    tokens = len(scores)
    q, k = torch.eye(1).expand(1, 1, tokens, 1).clone().requires_grad_(), scores.view(1, 1, tokens, 1).clone()
    k.requires_grad_()
    seen = SimpleNamespace(attention=attention_of([q], [k], [1.0]))
    side, prefix = (2, ("class",)) if method == "advit" else (1, ROLES)
    found = loss_of(method, student, [given(depth=1, heads=1, side=side, prefix=prefix)], [target], seen, **settings)
    compared = scores.double()[1:] if method == "advit" else scores.double()
    expected = -torch.log_softmax(compared, 0)[1]
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    if gap > 30:
        assert found.item() == pytest.approx(gap, rel=1e-6)
    found.backward()
    pull = compared.softmax(0) - F.one_hot(torch.tensor(1), len(compared))
    assert torch.allclose(grad(k).flatten()[-len(compared) :].double(), pull, atol=1e-6)


# ---------------------------------------------------------------------------------------------- heads, tokens, values


def merged(rows: Tensor, rule: str | None, temperature: float | None = None) -> Tensor:
    """Heads of plain rows `[B, H, …, N]` brought together, in f64 and without logarithms until the end."""
    match rule:
        case "mean" | "sum":
            merge: Callable[..., Tensor] = getattr(rows, rule)
            return merge(1, keepdim=True)
        case "max" | "min":
            rows = getattr(rows, f"a{rule}")(1, keepdim=True)
        case "log":
            rows = rows.pow(1 / (temperature or rows.shape[1])).prod(1, keepdim=True)
    return rows / rows.sum(-1, keepdim=True)


def attending(spread: float, heads: int = 3, tokens: int = 6, width: int = 4) -> dict[str, Tensor]:
    """q, k and v of a student whose heads turn away from the first tokens, by gaps of about four spreads."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, tokens, width) for _ in range(3))
    q[..., 0] = 1
    k[..., 0] += torch.linspace(-4, 4, tokens)
    return {"q": (q * spread).requires_grad_(), "k": k.requires_grad_(), "v": v}


@pytest.mark.parametrize("spread", [1.0, 15.0])
@pytest.mark.parametrize("rule", ["mean", "sum", "max", "min", "log", "first"])
@pytest.mark.parametrize("which", ["all", "class", "values"])
def test_losses_and_gradients_are_those_of_plain_rows_in_f64(which, rule, spread):
    """A student with a distillation token that the teacher lacks, other heads, and by `values` weights of keys."""
    student, method = StudentSpec(1, 3, 2, ROLES), "attention" if which == "all" else "guidance"
    target = torch.randn(2, 1, 2, 5, 5).softmax(-1)
    several, targets = [given(depth=1, heads=2, side=2)], [target]
    if which == "values":
        several.append(given("v", depth=1, heads=2, side=2, width=4))
        targets.append(F.normalize(torch.randn(2, 1, 2, 5, 4), dim=-1))  # of one norm: they weigh nothing
    settings = {"heads": rule, "head_temperature": None, **({"value_norm": True} if which == "values" else {})}
    parts = attending(spread)
    seen = SimpleNamespace(attention=attention_of(**{name: [part] for name, part in parts.items()}, scales=[0.5]))
    found = loss_of(method, student, several, targets, seen, **settings)
    found.backward()

    q, k = (parts[name].detach().double().requires_grad_() for name in ("q", "k"))
    rows = (q @ k.transpose(-2, -1) * 0.5).softmax(-1)
    if which == "values":
        rows = rows * parts["v"].double().norm(dim=-1)[:, :, None]
    kept = [0, 2, 3, 4, 5]
    mine, theirs = rows[:, :, kept][..., kept], target[:, 0].double()
    if which != "all":
        mine, theirs = mine[:, :, :1], theirs[:, :, :1]
    mine = mine / mine.sum(-1, keepdim=True)
    if rule == "first":
        mine = mine[:, :2]
    else:
        mine, theirs = merged(mine, rule), merged(theirs, rule)
    if spread > 1:
        assert mine.min() < 1e-12, "else this tells nothing"
    if which == "all":
        expected = -(theirs * mine.log()).sum(-1).mean((0, 2)).mean()
    else:
        expected = F.kl_div(mine.log(), theirs, reduction="none").sum((1, 2, 3)).mean()
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, exact in (("q", q), ("k", k)):
        largest = float(grad(exact).abs().max())
        assert torch.allclose(grad(parts[name]).double(), grad(exact), rtol=1e-4, atol=1e-6 * largest)


@pytest.mark.parametrize("rule", ["mean", "max", "min", "log", None])
@pytest.mark.parametrize("distance", ["kl", "ce"])
def test_advit_s_reading_of_logarithms_is_that_of_plain_rows_in_f64(distance, rule):
    parts, student = attending(15, tokens=5), StudentSpec(1, 3, 2, ("class",))
    stored = (torch.randn(2, 1, 3, 5, 5) * 25).softmax(-1)
    settings = {"distance": distance, "kl_input": "log-prob", "heads": rule, "renorm": True}
    settings |= {"temperature": 2.0} if distance == "kl" else {}
    seen = SimpleNamespace(attention=attention_of(**{name: [part] for name, part in parts.items()}, scales=[0.5]))
    found = loss_of("advit", student, [given(depth=1, side=2)], [stored], seen, **settings)
    found.backward()
    q, k = (parts[name].detach().double().requires_grad_() for name in ("q", "k"))
    mine = merged((q[:, :, :1] @ k.transpose(-2, -1) * 0.5).softmax(-1), rule)[..., 1:]
    theirs = merged(stored[:, 0, :, :1].double(), rule)[..., 1:]
    tau = settings.get("temperature", 1.0)
    mine, theirs = (rows.pow(1 / tau) / rows.pow(1 / tau).sum(-1, keepdim=True) for rows in (mine, theirs))
    assert mine.min() < 1e-6
    assert theirs.min() < 1e-6
    expected = (theirs * ((theirs.log() if distance == "kl" else 0) - mine.log())).sum(-1).mean() * tau**2
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, exact in (("q", q), ("k", k)):
        largest = float(grad(exact).abs().max())
        assert torch.allclose(grad(parts[name]).double(), grad(exact), rtol=1e-4, atol=1e-6 * largest)


# ---------------------------------------------------------------------------------------------- the teacher's side


@pytest.mark.parametrize("heads", ["log", "mean"])
@pytest.mark.parametrize("taps", [("class_row",), ("q", "k")])
def test_a_student_that_is_its_peaked_teacher_has_nothing_to_learn(taps, heads):
    parts = attending(15, tokens=5)
    rows = (parts["q"][:, :, :1] @ parts["k"].transpose(-2, -1) * 0.5).softmax(-1).detach()[:, None, :, 0]
    assert 1e-38 < rows.min() < 1e-12
    stored = {"class_row": rows, "q": parts["q"].detach()[:, None], "k": parts["k"].detach()[:, None]}
    one = [given(tap, depth=1, side=2, width=4) for tap in taps]
    one = [StoredTarget(target=g.target.model_copy(update={"scales": (0.5,)}), teacher=g.teacher) for g in one]
    seen = SimpleNamespace(attention=attention_of(**{name: [part] for name, part in parts.items()}, scales=[0.5]))
    for method, settings in (("guidance", {}), ("advit", {"distance": "kl", "kl_input": "log-prob"})):
        found = loss_of(
            method, StudentSpec(1, 3, 2, ("class",)), one, [stored[t] for t in taps], seen, heads=heads, **settings
        )
        found.backward(retain_graph=True)
        assert found.abs() < 1e-5
        assert grad(parts["q"]).abs().max() < 1e-4


@pytest.mark.parametrize("codec", ["f16", "log8"])
def test_a_stored_zero_counts_as_the_least_that_its_codec_keeps(codec):
    kept = Codec(codec, (1, 3, 5), 1)

    def kept_as(name: str) -> StoredTarget:
        target = given("class_row", depth=1, side=2)
        identity = target.target.identity.model_copy(update={"codec": name})
        return replace(target, target=target.target.model_copy(update={"identity": identity}))

    def stored(rows: Tensor) -> Tensor:
        return torch.from_numpy(kept.decode(kept.encode(rows.numpy()))).float()

    small = torch.logspace(-9, -3, 10000).view(-1, 1, 1, 1).expand(-1, 1, 3, 5).clone()
    small[..., 0] = 1
    least = stored(small)[stored(small) > 0].min()
    rows = torch.tensor([60.0, 50, 40, 0, -20]).softmax(0).expand(4, 1, 3, 5)
    decoded = stored(rows)
    one = kept_as(codec)
    made = AttentionAligner("it", advit.ADViTConfig(heads=None), StudentSpec(1, 3, 2, ("class",)), [one], "class")
    found, exact = made.teacher_logs([decoded]), rows.log()
    held = decoded > 0
    assert torch.allclose(found[held], exact[held], atol=0.05)
    assert not held[..., 3:].any()
    assert ((found[~held].exp() > least / 2) & (found[~held].exp() < least * 1.001)).all()
    assert torch.allclose(made.teacher_logs([rows]), found, atol=0.05), "live values of such a target meet it likewise"
    one = kept_as("f32")
    whole = AttentionAligner("it", advit.ADViTConfig(heads=None), StudentSpec(1, 3, 2, ("class",)), [one], "class")
    assert torch.allclose(whole.teacher_logs([rows]), torch.tensor([60.0, 50, 40, 0, -20]).log_softmax(0))
