"""Head-specific distillation: known answers, which samples count, and gradients where heads meet and nowhere else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from torch.autograd import gradcheck

from storage.store.store import Store
from storage.testing import TINY_VIT
from student.alignment.student_spec import StudentSpec, student_spec
from student.alignment.student_taps import StudentTaps
from student.data.stream import Stream
from student.losses import head_specific
from student.losses.base import LossInputs
from student.losses.head_specific import HeadSpecificLoss, correctness, difference
from student.models.build import build_student
from student.recipe.validate import validate
from student.targets.stored_target import stored_target
from student.training.distiller import Distiller, find_targets
from tests.conftest import World, run_precompute, teacher_of
from tests.student.alignment.test_matching import given
from tests.student.attention import attention_of
from tests.student.losses.test_losses import entropy, values

if TYPE_CHECKING:
    from student.data.batch import Batch

KINDS = ("mse", "mse-softmax", "ce", "kl")


def test_known_answers():
    teacher, student = values(2, 3, 4, 5, 5).softmax(-1), values(2, 3, 4, 5, 5, seed=1).softmax(-1)
    for kind in ("mse", "mse-softmax", "kl"):
        same, other = (x.log() if kind == "kl" else x for x in (teacher, student))
        assert difference(same, teacher, kind).abs().max() < 1e-15
        assert (difference(other, teacher, kind) > 0).all(), "Eq. 2.11 as printed is negative"
    assert torch.allclose(difference(student, teacher, "mse"), (teacher - student).square().mean((1, 2, 3, 4)))
    own = entropy(teacher).mean((1, 2, 3))
    assert torch.allclose(difference(teacher.log(), teacher, "ce"), own)
    ce, kl = difference(student.log(), teacher, "ce"), difference(student.log(), teacher, "kl")
    assert torch.allclose(ce - kl, own), "CE - KL is the teacher's entropy, whatever the student"
    by_hand = (teacher * (teacher / student).log()).sum(-1).mean((1, 2, 3))
    assert torch.allclose(kl, by_hand)


@pytest.mark.parametrize("kind", KINDS)
def test_input_gradients(kind):
    teacher = values(2, 1, 2, 3, 3, seed=1)
    target = teacher if kind == "mse" else teacher.softmax(-1)
    x = values(2, 1, 2, 3, 3).requires_grad_()
    read = {"mse": lambda x: x, "mse-softmax": lambda x: x.softmax(-1)}.get(kind, lambda x: x.log_softmax(-1))
    assert gradcheck(lambda x: difference(read(x), target, kind).sum(), x)


def test_a_decision_is_as_right_as_its_class_has_of_the_mixed_label():
    logits = torch.eye(3)[[0, 0, 0, 0, 2]].requires_grad_()
    labels, others = torch.tensor([0, 1, 0, 1, 2]), torch.tensor([0, 1, 1, 0, 2])
    found = correctness(logits, labels, others, torch.tensor([0.0, 0.0, 0.3, 0.3, 0.4]))
    assert torch.allclose(found, torch.tensor([1.0, 0.0, 0.7, 0.3, 1.0]))
    assert not found.requires_grad


@pytest.fixture(scope="module")
def kept(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict[str, str]]:
    """The tiny ViT's attention and logits in f32."""
    place = tmp_path_factory.mktemp("heads") / "store"
    names = ("attention", "q", "k", "logits")
    wishes = [f"{tap},codec=f32" for tap in names]
    made = run_precompute(place, world.shards, teacher_of(world.weights, "vit"), wishes, num_views=1)
    return Store.open(place), dict(zip(names, made["targets"], strict=True))


def distiller_of(world: World, kept, taught: bool = False, **settings) -> tuple[Distiller, Batch]:
    """A student of the teacher's sizes, or the teacher itself, and a batch of the store."""
    store, _ = kept
    sizes = {name: TINY_VIT[1][name] for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}
    losses = {"it": {"type": "head_specific", "same_classes": True, **settings}}
    recipe = validate({"student": {"model": TINY_VIT[0], **sizes}, "losses": losses}, "test")
    torch.manual_seed(0)
    model, _ = build_student(recipe.student, 3)
    if taught:
        model.load_state_dict(load_file(world.weights["vit"]))
    shards = [store.require(url, store.shard_ids()).id for url in world.shards]
    _, found = find_targets(store, shards, recipe, model)
    distiller = Distiller(recipe, model, found, mean=(0.5,) * 3, std=(0.5,) * 3)
    stream = Stream(world.shards, batch_size=32, store=store, targets=list(distiller.target_ids["it"]))
    return distiller, next(iter(stream.epoch(0)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(world, kept, kind):
    distiller, batch = distiller_of(world, kept, True, distance=kind)
    _, found = distiller(batch)
    least = torch.zeros(())
    if kind == "ce":
        method: Any = distiller.losses["it"]
        rows = method.rows.teacher_rows([batch.target(id) for id in distiller.target_ids["it"]])
        least = entropy(rows.clamp_min(1e-30)).mean()
    assert (found["it"] - least).abs() < 2e-6
    found["it"].backward()
    assert max(float(p.grad.abs().max()) for p in distiller.parameters() if p.grad is not None) < 1e-5
    taps = {"mse": ["q", "k"]}.get(kind, ["attention"])
    assert distiller.target_ids["it"] == tuple(kept[1][tap] for tap in taps)


@pytest.mark.parametrize("kind", KINDS)
def test_only_heads_that_meet_get_gradients(world, kept, kind):
    """Head 2 of the first layer: its q and k alone, no v, no later layer; what comes before it learns too."""
    distiller, batch = distiller_of(world, kept, distance=kind, layers=[[1, 3]], heads=[[2, 1]])
    _, found = distiller(batch)
    found["it"].backward()
    student: Any = distiller.student
    first, *later = student.blocks
    moved = first.attn.qkv.weight.grad.unflatten(0, (3, 3, 16)).abs().amax((2, 3)) > 0
    assert moved.tolist() == [[False, True, False], [False, True, False], [False] * 3]
    after = [first.attn.proj, first.mlp, *later, student.norm, student.head]
    assert all(p.grad is None or not p.grad.any() for module in after for p in module.parameters())
    assert student.patch_embed.proj.weight.grad.any()


def test_scores_are_those_of_the_network_before_its_softmax(world, kept):
    """From live q and k; each side's own 1/√d: a student of wider heads with the same map has the same scores."""
    distiller, batch = distiller_of(world, kept, True)
    layers = student_spec(distiller.student).attention
    with StudentTaps(distiller.student, frozenset({"attention"}), layers) as seen:
        distiller.student(batch.pixels((0.5,) * 3, (0.5,) * 3))
    method: Any = distiller.losses["it"]
    scores = method.rows.student_rows(seen.attention)
    expected = seen.vectors("q")[0] @ seen.vectors("k")[0].transpose(-2, -1) * 16**-0.5
    assert torch.allclose(scores[:, 0], expected, atol=1e-5)
    meets = head_specific.HeadSpecificConfig(heads=[[1, 1]])
    wide = HeadSpecificLoss(
        "it", meets, StudentSpec(4, 2, 4, ("class",)), [given("q"), given("k")]
    )  # width 8 on the teacher's side
    q, k = torch.randn(2, 2, 4, 2, 17, 8).unbind(0)
    wider = [torch.cat([layer * 2**0.5, torch.zeros_like(layer)], -1) for layer in q.unbind(1)]
    mine = wide.rows.student_rows(attention_of(wider, [torch.cat([x, x], -1) for x in k.unbind(1)], [16**-0.5] * 4))
    assert torch.allclose(mine, wide.rows.teacher_rows([q, k]), atol=1e-5)


def test_samples_that_are_decided_wrongly_do_not_count(world, kept):
    distiller, batch = distiller_of(world, kept, distance="kl", adaptive="teacher-correct")
    assert distiller.target_ids["it"] == (kept[1]["attention"], kept[1]["logits"])
    assert distiller.rows[0].rule.endswith("3 logits of vit: taken as the same (same_classes)")
    method: Any = distiller.losses["it"]
    pixels = batch.pixels(distiller.mean, distiller.std)
    with distiller.student_taps as seen:
        logits = distiller.student(pixels)
    targets = tuple(batch.target(id) for id in distiller.target_ids["it"])
    right = (targets[1].argmax(1) == batch.labels).float()
    assert 0 < right.mean() < 1, "else this tells nothing"

    def loss(
        labels: torch.Tensor, mix_labels: torch.Tensor, mix_weights: torch.Tensor, own: Any = method, **more: Any
    ) -> Any:
        inputs = {"logits": logits, "student_taps": seen, "labels": labels, "mix_labels": mix_labels}
        return own(LossInputs(**{**inputs, "mix_weights": mix_weights, "targets": targets, **more}))

    none = torch.zeros(32)
    rows = method.rows.student_rows(seen.attention)
    each = difference(rows.log(), method.rows.teacher_rows(targets[:1]), "kl")
    assert torch.isclose(loss(batch.labels, batch.labels, none), (right * each).mean())
    half = loss(batch.labels, (batch.labels + 1) % 3, none + 0.5)
    other = (targets[1].argmax(1) == (batch.labels + 1) % 3).float()
    assert torch.isclose(half, ((right + other) / 2 * each).mean())
    adaptive = head_specific.HeadSpecificConfig(distance="kl", adaptive="student-correct")
    given = [stored_target(kept[0], kept[1]["attention"])]
    by_student = HeadSpecificLoss("it", adaptive, StudentSpec(3, 3, 4, ("class",), 3), given)
    targets = targets[:1]
    decided = torch.nn.functional.one_hot(batch.labels, 3).float().requires_grad_()
    metrics: dict[str, torch.Tensor] = {}
    assert torch.isclose(
        loss(batch.labels, batch.labels, none, by_student, logits=decided, metrics=metrics), each.mean()
    )
    assert metrics["it kept"] == 1
    wrong = loss(batch.labels, batch.labels, none, by_student, logits=-decided)
    assert wrong == 0
    distilled = -3 * decided  # the mean of both heads decides, as it does in evaluation
    assert loss(batch.labels, batch.labels, none, by_student, logits=decided, distillation_logits=distilled) == 0
    loss(batch.labels, batch.labels, none, by_student, logits=decided).backward()
    assert decided.grad is None
