"""The head that fit-teacher fits: where its loss is least, chosen by held out samples, put into any network."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch

from precompute.taps import Tap, TappedTeacher
from storage.errors import UserError
from storage.objects.weights_file import WeightsFile
from storage.testing import TINY_CNN, TINY_VIT
from student.fit_teacher.logistic_regression import Examples, Head, fit, held_out, search_strength
from student.fit_teacher.network import heads_of, network_of, put_in
from tests.manifests import teacher_manifest
from tests.student.runs import POOLED
from tests.typed import grad


def examples_of(count: int = 600, width: int = 6, classes: int = 3, gap: float = 2.0, mix: bool = True) -> Examples:
    """Blobs in blocks of 30, half of them mixed; features of very different scales, one that does not move."""
    chance = np.random.default_rng(0)
    labels, others = chance.integers(0, classes, (2, count))
    shares = np.where(chance.random(count) < 0.5, 0, chance.random(count)) * mix
    centers = gap * chance.normal(size=(classes, width))
    x = (1 - shares)[:, None] * centers[labels] + shares[:, None] * centers[others] + chance.normal(size=(count, width))
    x = np.concatenate([x * 10.0 ** np.arange(-2, width - 2) + 5, np.full((count, 1), 7.0)], 1)
    return Examples(
        torch.tensor(x, dtype=torch.float32),
        torch.tensor(labels),
        torch.tensor(others),
        torch.tensor(shares, dtype=torch.float32),
        torch.arange(count) // 30,
    )


def test_the_head_is_where_the_gradient_of_the_written_loss_vanishes():
    """By autograd over one-hot labels mixed by hand: L2 is on the weights of standardized features, not on biases."""
    examples, l2 = examples_of(), 0.03
    rows = torch.arange(0, 600, 2)
    head = fit(examples, rows, 3, l2)
    x = examples.features[rows].double()
    deviation = x.std(0, correction=0)
    deviation[-1] = 7e-3  # it does not move
    soft = torch.zeros(300, 3, dtype=torch.float64)
    for i, row in enumerate(rows.tolist()):
        share = float(examples.mix_weights[row])
        soft[i, examples.labels[row]] += 1 - share
        soft[i, examples.mix_labels[row]] += share
    weight = (head.weight * deviation).requires_grad_(True)
    bias = (head.bias + head.weight @ x.mean(0)).requires_grad_(True)
    z = (x - x.mean(0)) / deviation
    loss = -(soft * (z @ weight.T + bias).log_softmax(1)).sum(1).mean() + l2 / 2 * weight.square().sum()
    loss.backward()
    assert grad(weight).abs().max() < 1e-5
    assert grad(bias).abs().max() < 1e-5
    assert weight.abs().max() > 0.1
    assert torch.allclose(head.logits(examples.features[rows]), (z @ weight.T + bias).detach(), atol=1e-9)


def test_a_head_that_begins_elsewhere_ends_at_the_same_place():
    examples, rows = examples_of(), torch.arange(600)
    far = Head(torch.randn(3, 7, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    near, other = fit(examples, rows, 3, 0.1), fit(examples, rows, 3, 0.1, far)
    assert torch.allclose(near.logits(examples.features), other.logits(examples.features), atol=1e-3)


def test_separable_features_are_told_apart_and_weak_regularization_is_chosen():
    examples = examples_of(gap=30.0, mix=False)
    tried = search_strength(examples, 3, seed=0)
    assert tried[0].top1 == 100
    assert tried[0].l2 < 0.01
    head = fit(examples, torch.arange(600), 3, tried[0].l2)
    assert (head.logits(examples.features).argmax(1) == examples.labels).all()


def test_the_strength_is_chosen_by_samples_that_were_not_fitted():
    """Features that say nothing: the strongest is best, though the weakest fits its own samples best."""
    chance = torch.Generator().manual_seed(0)
    noise = Examples(
        torch.randn(200, 100, generator=chance),
        torch.arange(200) % 2,
        torch.arange(200) % 2,
        torch.zeros(200),
        torch.arange(200) // 20,
    )
    tried = search_strength(noise, 2, seed=0)
    assert tried[0].l2 == 1.0
    assert [one.loss for one in tried] == sorted(one.loss for one in tried)
    assert len(tried) == 3, "two that only made it worse are enough"


def test_whole_blocks_are_held_out():
    blocks = torch.arange(40).repeat_interleave(5).repeat(2)  # two views
    rows, away = held_out(blocks, seed=0)
    assert not {*blocks[rows].tolist()} & {*blocks[away].tolist()}
    assert len({*blocks[away].tolist()}) == 8
    assert sorted([*rows.tolist(), *away.tolist()]) == list(range(400))
    assert not torch.equal(held_out(blocks, seed=1)[1], away)


NETWORKS = [
    TINY_CNN,
    TINY_VIT,
    POOLED,
    ("mobilenetv2_050", {"pad_type": "same"}),
    ("convnext_atto", {"depths": [1, 1, 1, 1]}),
    ("deit_tiny_distilled_patch16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}),
]


@pytest.mark.parametrize(("name", "arguments"), NETWORKS, ids=[name for name, _ in NETWORKS])
def test_a_head_on_the_embedding_is_the_classifier_of_any_network(tmp_path, name, arguments):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    original = timm.create_model(name, num_classes=7, **arguments)
    save_file(original.state_dict(), tmp_path / "w.safetensors")
    digest = WeightsFile(tmp_path / "w.safetensors").digest
    identity = {"model": name, "arguments": {**arguments, "num_classes": 7}, "weights sha256": digest}
    recorded = teacher_manifest(identity, weights=str(tmp_path / "w.safetensors"))
    model = network_of(recorded, None, 4)
    views = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    module = TappedTeacher(
        model, [Tap("embedding"), Tap("logits")], 32, input_size=32, mean=[0.5] * 3, std=[0.5] * 3
    ).eval()
    old = TappedTeacher(original.eval(), [Tap("embedding")], 32, input_size=32, mean=[0.5] * 3, std=[0.5] * 3).eval()
    with torch.no_grad():
        features, _ = module(views)
        assert torch.equal(features, old(views)[0]), "all but the head is the recorded network"
        head = Head(torch.randn(4, features.shape[1], dtype=torch.float64), torch.randn(4, dtype=torch.float64))
        put_in(model, head, "t")
        logits = module(views)[1]
    assert logits.shape == (2, 4)
    assert torch.allclose(head.logits(features).float(), logits, rtol=1e-4, atol=1e-4)
    assert len(heads_of(model)) == (2 if "distilled" in name else 1)


def test_a_classifier_that_is_not_linear_is_refused():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **TINY_VIT[1])
    with pytest.raises(UserError, match=r"its classifier head is a Identity"):
        put_in(model, Head(torch.zeros(3, 48), torch.zeros(3)), "t")
