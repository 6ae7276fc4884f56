"""Losses: known answers (PAPERS, section 10), input gradients in f64, and zero for a student that is its teacher."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.autograd import gradcheck
from torch.nn import functional as F

from storage.errors import UserError
from storage.store.store import Store
from storage.testing import TINY_VIT
from student.alignment.attention import AttentionAligner, log_mean
from student.alignment.student_spec import StudentSpec
from student.data.stream import Stream
from student.losses import advit, attention_transfer, deit
from student.losses.aal import AAL, class_maps
from student.losses.cross_entropy import cross_entropy
from student.models.build import build_student
from student.recipe.validate import validate
from student.targets.stored_target import stored_target
from student.training.distiller import Distiller
from tests.conftest import run_precompute, teacher_of
from tests.student.alignment.test_matching import given
from tests.student.attention import attention_of
from tests.typed import grad

F64 = torch.float64


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def entropy(rows: torch.Tensor) -> torch.Tensor:
    return -(rows * rows.log()).sum(-1)


# ---------------------------------------------------------------------------------------------- known answers


def test_soft_distillation_in_both_normalizations():
    student, teacher = values(4, 10), values(4, 10, seed=1)
    for tau in (1.0, 3.0):
        p, q = (teacher / tau).softmax(1), (student / tau).softmax(1)
        by_hand = tau**2 * (p * (p / q).log()).sum() / 4
        assert torch.isclose(deit.soft(student, teacher, tau, "batchmean"), by_hand)
        assert torch.isclose(deit.soft(student, teacher, tau, "mean") * 10, by_hand)
    assert deit.soft(teacher, teacher).abs() < 1e-15
    assert torch.isclose(deit.soft(teacher + 5, teacher), torch.zeros((), dtype=F64), atol=1e-12)


def test_hard_distillation_is_cross_entropy_with_the_teacher_s_decision():
    student, teacher = values(4, 10), values(4, 10, seed=1)
    assert torch.equal(deit.hard(student, teacher), F.cross_entropy(student, teacher.argmax(1)))
    assert deit.hard(teacher * 1000, teacher) < 1e-6


def test_attention_distillation_is_the_teacher_s_entropy_when_matched():
    teacher = values(2, 3, 4, 5, 5).softmax(-1)
    by_layer = entropy(teacher).mean((0, 3))
    assert torch.isclose(attention_transfer.distillation(teacher.log(), teacher), by_layer.mean(1).sum())
    assert torch.isclose(attention_transfer.distillation(teacher.log(), teacher, "sum"), by_layer.sum())
    uniform = torch.full((1, 1, 1, 197, 197), 1 / 197, dtype=F64)
    assert attention_transfer.distillation(uniform.log(), uniform).item() == pytest.approx(math.log(197))
    assert math.log(197) == pytest.approx(5.2832, abs=1e-4)
    other = values(2, 3, 4, 5, 5, seed=1).softmax(-1)
    kl = (teacher * (teacher / other).log()).sum(-1).mean((0, 3)).mean(1).sum()
    found = attention_transfer.distillation(other.log(), teacher)
    assert torch.isclose(found - kl, by_layer.mean(1).sum()), "CE - KL is the teacher's entropy"


def test_squares_are_the_mean_over_all_but_layers():
    student, teacher = values(2, 3, 4, 5, 6), values(2, 3, 4, 5, 6, seed=1)
    by_layer = torch.stack([F.mse_loss(student[:, n], teacher[:, n]) for n in range(3)]).sum()
    assert torch.isclose(attention_transfer.squares(student, teacher), by_layer)
    assert attention_transfer.squares(teacher, teacher) == 0


def test_distances_of_class_rows():
    teacher = values(2, 3, 1, 10).softmax(-1)
    student = values(2, 3, 1, 10, seed=1).softmax(-1)
    for kind in ("l1", "l2"):
        assert advit.distance(teacher, teacher, 1, kind) == 0
        assert 0 < advit.distance(student, teacher, 1, kind) <= 2
    opposite = torch.eye(10, dtype=F64)[None, None, None, 3], torch.eye(10, dtype=F64)[None, None, None, 7]
    assert advit.distance(*opposite, 1, "l1") == advit.distance(*opposite, 1, "l2") == 2
    moved = teacher.clone()
    moved[..., 0] += 1
    assert advit.distance(moved, teacher, 1) == 0, "the class token's own key does not count"


def test_known_answers_of_advit_s_kl():
    one_hot, uniform = torch.eye(197, dtype=F64)[None, None, None, 5], torch.full((1, 1, 1, 197), 1 / 196, dtype=F64)
    assert advit.divergence(uniform, one_hot, 1).item() == pytest.approx(0.0050, abs=5e-5), "of a softmax of a softmax"
    undamped = advit.divergence(uniform.log(), one_hot.clamp_min(1e-30).log(), 1).item()
    assert undamped == pytest.approx(math.log(196), abs=0.01), "and of A itself"
    teacher, student = values(2, 3, 2, 10).softmax(-1), values(2, 3, 2, 10, seed=1).softmax(-1)
    for on in ("prob", "log-prob"):
        theirs, mine = (rows.log() if on == "log-prob" else rows for rows in (teacher, student))
        assert advit.divergence(theirs, theirs, 1, 2.0).abs() < 1e-15
        for tau in (1.0, 3.0):
            z = [given[..., 1:] / tau for given in (theirs, mine)]
            p, q = (one.softmax(-1) for one in z)
            kl = [tau**2 * (a * (a / b).log()).sum(-1).mean() for a, b in ((p, q), (q, p))]
            assert torch.isclose(advit.divergence(mine, theirs, 1, tau), kl[0])
            assert torch.isclose(advit.divergence(mine, theirs, 1, tau, "student-first"), kl[1])
    ours = advit.divergence(values(2, 3, 2, 10, seed=2).log_softmax(-1), teacher.log(), 1, 3.0)
    p, q = ((z[..., 1:] / 3).softmax(-1) for z in (teacher.log(), values(2, 3, 2, 10, seed=2)))
    assert torch.isclose(ours, 9 * (p * (p / q).log()).sum(-1).mean()), "scores give what logarithms of rows do"


def test_the_literal_reading_s_cross_entropy_is_least_at_the_teacher_s_own_map():
    teacher, student = values(2, 3, 2, 10).softmax(-1), values(2, 3, 2, 10, seed=1).softmax(-1)
    patches = teacher[..., 1:] / teacher[..., 1:].sum(-1, keepdim=True)
    own = advit.cross_entropy(patches.log(), patches, 0)
    assert torch.isclose(own, entropy(patches).mean())
    mine = student[..., 1:].log()
    assert torch.isclose(advit.cross_entropy(mine, patches, 0) - own, advit.divergence(mine, patches.log(), 0))


# ---------------------------------------------------------------------------------------------- gradients


def test_input_gradients_are_those_of_autograd_s_numerical_check():
    teacher = values(3, 5, seed=1)
    labels, others, shares = torch.tensor([0, 1, 4]), torch.tensor([2, 1, 0]), torch.tensor([0.0, 0.3, 0.5]).double()
    logits = values(3, 5).requires_grad_()
    assert gradcheck(lambda x: deit.hard(x, teacher), logits)
    for reduction in ("mean", "batchmean"):
        assert gradcheck(lambda x, r=reduction: deit.soft(x, teacher, 2.0, r), logits)
    assert gradcheck(lambda x: cross_entropy(x, labels, others, shares, 0.1), logits)
    rows = values(2, 2, 2, 5).requires_grad_()
    target = values(2, 2, 2, 5, seed=1).softmax(-1)
    for kind in ("l1", "l2"):
        assert gradcheck(lambda x, k=kind: advit.distance(x.softmax(-1), target, 1, k), rows)
    for read, theirs in ((torch.softmax, target), (torch.log_softmax, target.log())):
        assert gradcheck(lambda x, r=read, t=theirs: advit.divergence(r(x, -1), t, 1, 2.0), rows)
        assert gradcheck(lambda x, r=read: advit.cross_entropy(r(x, -1), target, 1), rows)
    assert gradcheck(lambda x: advit.divergence(x.softmax(-1), target, 1, direction="student-first"), rows)
    assert gradcheck(lambda x: log_mean(x.log_softmax(-1), 3).square().sum(), rows)
    maps, targets = values(2, 2, 2, 3, 3).requires_grad_(), values(2, 2, 2, 3, 3, seed=1).softmax(-1)
    for heads in ("mean", "sum"):
        assert gradcheck(lambda x, h=heads: attention_transfer.distillation(x.log_softmax(-1), targets, h), maps)
    assert gradcheck(lambda x: attention_transfer.squares(x, targets), maps)


@pytest.mark.parametrize("reading", ["mse", "norm", "sq"])
@pytest.mark.parametrize("how", ["scaled", "printed", "full"])
def test_input_gradients_of_aal_down_to_q_and_k(reading, how):
    torch.manual_seed(0)
    loss = AAL(4, 3, reading).double()
    target = values(2, 3, 2, 2, seed=1)
    q, k = ([values(2, 2, 5, 3, seed=s + n).requires_grad_() for n in (0, 1)] for s in (2, 4))

    def run(*tensors: torch.Tensor) -> Any:
        return loss(class_maps(attention_of(tensors[:2], tensors[2:], [3**-0.5] * 2), 1, how), target)

    assert gradcheck(run, (*q, *k))


@pytest.mark.parametrize("which", ["class", "all"])
def test_input_gradients_through_heads_grids_and_tokens_that_differ(which):
    settings = attention_transfer.AttentionTransferConfig(layers="uniform", heads="log", grid="bicubic")
    student = StudentSpec(1, 2, 2, ("class", "distillation"))
    made = AttentionAligner(
        "it", settings, student, [given(depth=2, side=3, prefix=("class", "register"))], which
    ).double()
    target = made.teacher_rows([values(1, 2, 3, 11, 11, seed=1).softmax(-1)])
    q, k = values(1, 2, 6, 3).requires_grad_(), values(1, 2, 6, 3, seed=2).requires_grad_()

    def run(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        mine = made.student_logs(attention_of([q], [k], [3**-0.5]))
        assert mine.shape == target.shape
        return (target * mine).sum()

    assert gradcheck(run, (q, k))


# ---------------------------------------------------------------------------------------------- student = teacher


@pytest.fixture(scope="module")
def same(world, tmp_path_factory) -> tuple[Store, dict[str, str]]:
    """The ViT's targets in f32, for a student that is this very network."""
    place = tmp_path_factory.mktemp("same") / "store"
    taps = {tap: tap for tap in ("class_row", "attention", "logits", "class_token", "tokens", "q", "k", "v")}
    taps["streams"] = "tokens,layers=1:3"
    wishes = [f"{tap},codec=f32" for tap in taps.values()]
    made = run_precompute(place, world.shards, teacher_of(world.weights, "vit"), wishes, num_views=1)
    return Store.open(place), dict(zip(taps, made["targets"], strict=True))


@pytest.mark.parametrize(
    ("loss", "tap"),
    [
        ({"type": "advit"}, "class_row"),
        ({"type": "advit", "distance": "l2", "heads": None}, "class_row"),
        ({"type": "advit", "distance": "kl", "kl_input": "log-prob", "heads": "max", "renorm": True}, "class_row"),
        ({"type": "attention"}, "attention"),
        ({"type": "attention", "heads": "log"}, "attention"),
        ({"type": "deit", "distillation_type": "soft", "same_classes": True}, "logits"),
        ({"type": "guidance", "layers": None}, "class_row"),
        ({"type": "guidance", "heads": "log", "head_temperature": 1, "distance": "mse"}, "class_row"),
        ({"type": "alignment", "depth": 0}, "class_token"),
        ({"type": "alignment", "depth": 0, "distance": "cosine", "tokens": "both"}, "tokens"),
        *[({"type": "attention", "tensors": what}, what) for what in ("q", "k", "v", "qk")],
        ({"type": "attention", "tensors": "q", "heads": "first-2", "layers": "first-1"}, "q"),
        ({"type": "features", "layers": [1, 3]}, "streams"),
    ],
)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(world, same, loss, tap):
    store, targets = same
    sizes = {name: TINY_VIT[1][name] for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}
    recipe = validate({"student": {"model": TINY_VIT[0], **sizes}, "losses": {"it": loss}}, "test")
    model, _ = build_student(recipe.student, 3)
    model.load_state_dict(load_file(world.weights["vit"]))
    ids = [targets[one] for one in (tap if tap == "qk" else [tap])]
    distiller = Distiller(
        recipe, model, {"it": [stored_target(store, id) for id in ids]}, mean=(0.5,) * 3, std=(0.5,) * 3
    ).eval()
    stream = Stream(world.shards, batch_size=32, store=store, targets=ids)
    for batch in stream.epoch(0):
        distiller.zero_grad()
        _, found = distiller(batch)
        loss_ = found["it"]
        if tap == "attention":
            method: Any = distiller.losses["it"]
            rows = method.rows.teacher_rows((batch.target(targets[tap]),))
            loss_ = loss_ - entropy(rows.clamp_min(1e-30)).mean((0, 3)).mean(1).sum()
        assert loss_.abs() < 2e-5
        if loss.get("distance", "") != "" or tap != "class_row":  # |x| has no gradient at zero
            found["it"].backward()
            largest = max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
            assert largest < 1e-4
    if tap == "logits":
        assert distiller.metrics["it agreement"] == 1
    with torch.no_grad():
        blocks: Any = model.blocks
        for block in blocks[:2]:
            block.attn.qkv.weight.mul_(3)
        _, found = distiller(batch)
    changed = found["it"] - (entropy(rows.clamp_min(1e-30)).mean((0, 3)).mean(1).sum() if tap == "attention" else 0)
    assert changed > 1e-4, "and another student has"


def of_store(world, same, tap: str, loss: dict[str, Any], **student: Any) -> Distiller:
    store, targets = same
    sizes = {name: TINY_VIT[1][name] for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}
    content = {"student": {"model": TINY_VIT[0], **sizes, **student}, "losses": {"it": loss}}
    recipe = validate(content, "test")
    torch.manual_seed(0)
    model, _ = build_student(recipe.student, 3)
    return Distiller(recipe, model, {"it": [stored_target(store, targets[tap])]}, mean=(0.5,) * 3, std=(0.5,) * 3)


def test_features_of_another_width_meet_by_a_projection_that_is_trained_or_are_refused(world, same):
    loss = {"type": "features", "layers": "first-2"}
    with pytest.raises(UserError, match=r"each token is 48 in the teacher, 24 .*\n.*`losses.it.projection=linear`"):
        of_store(world, same, "streams", loss, embed_dim=24)
    distiller = of_store(world, same, "streams", {**loss, "projection": "linear"}, embed_dim=24)
    batch = next(Stream(world.shards, batch_size=32, store=same[0], targets=[same[1]["streams"]]).epoch(0))
    _, found = distiller(batch)
    found["it"].backward()
    projections = [p for n, p in distiller.losses.named_parameters() if "projections" in n]
    assert [tuple(p.shape) for p in projections] == [(48, 24), (48,)] * 2
    assert all(grad(p).abs().max() > 0 for p in projections)
    blocks: Any = distiller.student.blocks
    touched = [p.grad is not None and bool(p.grad.abs().max() > 0) for p in blocks.parameters()]
    count = len(touched) // 3
    assert all(touched[: 2 * count])
    assert not any(touched[2 * count :]), "the third block's stream is not compared"


def test_only_what_is_compared_gets_a_gradient(world, same):
    """Of q alone: nothing of k, v and later layers, and of other heads."""
    distiller = of_store(
        world, same, "q", {"type": "attention", "tensors": "q", "layers": "first-1", "heads": "first-2"}
    )
    batch = next(Stream(world.shards, batch_size=32, store=same[0], targets=[same[1]["q"]]).epoch(0))
    distiller(batch)[1]["it"].backward()
    blocks: Any = distiller.student.blocks
    slopes = blocks[0].attn.qkv.weight.grad.reshape(3, 3, 16, 48)
    assert [[bool(s.abs().max() > 0) for s in part] for part in slopes] == [
        [True, True, False],
        [False] * 3,
        [False] * 3,
    ]
    assert blocks[1].attn.qkv.weight.grad is None
    assert blocks[0].mlp.fc1.weight.grad is None


def test_tokens_after_the_final_norm_are_no_residual_stream(world, same, tmp_path):
    made = run_precompute(tmp_path / "store", world.shards, teacher_of(world.weights, "vit"), ["tokens"], num_views=1)
    store = Store.open(tmp_path / "store")
    with pytest.raises(UserError, match=r"holds tokens after the final norm.*\n.*target=tokens,layers=last"):
        of_store(world, (store, {"tokens": made["targets"][0]}), "tokens", {"type": "features"})


def test_vectors_of_another_width_are_refused(world, same):
    with pytest.raises(UserError, match=r"each head's v is 16 in the teacher, 32 in layer 1 .*\n  Compare maps"):
        of_store(world, same, "v", {"type": "attention", "tensors": "v"}, embed_dim=96)


# ---------------------------------------------------------------------------------------------- two heads


class TwoHeads(nn.Module):
    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.distilled = nn.Linear(3, 3), nn.Linear(3, 3), False

    def set_distilled_training(self, on: bool) -> None:
        self.distilled = on

    def forward(self, images: torch.Tensor) -> Any:
        x = images.mean((2, 3))
        return (self.first(x), self.second(x)) if self.distilled else (self.first(x) + self.second(x)) / 2


def two(losses: dict[str, Any], target: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    recipe = validate({"losses": losses}, "test")
    manifest, teacher = SimpleNamespace(id="t", sample_shape=[3]), SimpleNamespace(id="t", classes=None)
    both: dict[str, Any] = {"deit": (SimpleNamespace(target=manifest, teacher=teacher, id="t"),)}
    torch.manual_seed(0)
    distiller = Distiller(recipe, TwoHeads(), both if "deit" in losses else {}, mean=(0.5,) * 3, std=(0.5,) * 3)
    images = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 1])
    batch = SimpleNamespace(
        images=images,
        labels=labels,
        mix_labels=labels,
        mix_weights=torch.zeros(4),
        target=lambda id: target,
        pixels=lambda mean, std: (images.permute(0, 3, 1, 2).float() / 255 - mean) / std,
    )
    _, found = distiller(batch)
    first, second = distiller.student(batch.pixels(0.5, 0.5))
    return {
        **found,
        "first": F.cross_entropy(first, labels),
        "second": F.cross_entropy(second, labels),
        "second hard": F.cross_entropy(second, target.argmax(1)) if target is not None else first,
    }


def test_a_distillation_head_learns_from_the_teacher_else_from_the_labels():
    alone = two({"crossentropy": {}})
    assert torch.isclose(alone["crossentropy"], (alone["first"] + alone["second"]) / 2)
    told = two({"crossentropy": {"heads": "class"}})
    assert torch.equal(told["crossentropy"], told["first"])
    teacher = torch.randn(4, 3)
    both = two({"crossentropy": {}, "deit": {"same_classes": True}}, teacher)
    assert torch.equal(both["crossentropy"], both["first"])
    assert torch.equal(both["deit"], both["second hard"])


# ---------------------------------------------------------------------------------------------- schedules


def test_schedules():
    def at(weight: Any, *epochs: int) -> list[float]:
        schedule = validate({"losses": {"aal": {"weight": weight}}}, "test").losses["aal"].weight
        return [schedule.at(epoch) for epoch in epochs]

    assert at(2, 0, 500) == [2, 2]
    aal = {"start": 2000, "decay": 0.99, "then": {200: 0.98}}
    assert at(aal, 0, 200, 299, 300) == pytest.approx([2000, 267.96, 36.26, 35.54], rel=1e-4)
    assert at({"start": 1, "shape": "linear", "end": 0.5, "over": 10}, 0, 5, 10, 99) == pytest.approx(
        [1, 0.75, 0.5, 0.5]
    )
    cosine = at({"start": 1, "shape": "cosine", "end": 0, "over": 10}, 0, 5, 10, 11)
    assert cosine == pytest.approx([1, 0.5, 0, 0])
    assert at({"start": 3, "until": 5}, 4, 5, 6) == [3, 0, 0]
    assert at({**aal, "until": 250}, 200, 250) == pytest.approx([267.96, 0], rel=1e-4)
