"""AAL against the equations as printed, and the known answers of docs and paper."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import timm
import torch
from torch import nn

from student.losses import aal
from student.losses.aal import AAL, class_maps
from tests.student.attention import taps_of
from tests.typed import present

if TYPE_CHECKING:
    from precompute.taps import Attention


def printed(aal: AAL, maps: torch.Tensor, activations: torch.Tensor) -> dict[str, torch.Tensor]:
    """Equations 4 and 5, written as they stand."""
    grown = aal.links(maps)
    mine = grown / (grown.norm(dim=-1, keepdim=True) + 1e-12)
    theirs = activations.flatten(2)
    theirs = theirs / (theirs.norm(dim=-1, keepdim=True) + 1e-12)
    square = (mine - theirs).square()
    return {"mse": square.mean(), "sq": square.sum(-1).mean(), "norm": square.sum(-1).sqrt().mean()}


def some(b=3, m=6, c=10, g=4, dtype=torch.float64):
    torch.manual_seed(0)
    maps = torch.rand(b, m, g * g, dtype=dtype).softmax(-1)
    activations = torch.randn(b, c, g, g, dtype=dtype)
    return maps, activations, AAL(m, c).to(dtype)


@pytest.mark.parametrize("reading", ["mse", "norm", "sq"])
def test_inner_products_give_the_printed_loss_and_gradients(reading):
    maps, activations, aal = some()
    aal.distance = reading
    maps.requires_grad_()
    expected = printed(aal, maps, activations)[reading]
    wanted = torch.autograd.grad(expected, [maps, *aal.parameters()])
    loss = aal(maps, activations)
    found = torch.autograd.grad(loss, [maps, *aal.parameters()])
    assert torch.allclose(loss, expected, rtol=1e-9)
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-10) for a, b in zip(found, wanted, strict=True))


def test_input_gradients_against_the_numerical_ones():
    maps, activations, aal = some(b=2, m=3, c=4, g=3)
    maps.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, w, b: torch.func.functional_call(aal, {"links.weight": w, "links.bias": b}, (x, activations)),
        (maps, aal.links.weight, aal.links.bias),
    )


def test_random_maps_give_two_over_196():
    torch.manual_seed(1)
    aal = AAL(72, 200)
    loss = aal(torch.rand(8, 72, 196), torch.randn(8, 200, 14, 14))
    assert loss.item() == pytest.approx(2 / 196, rel=0.02)
    aal.distance = "norm"
    assert aal(torch.rand(8, 72, 196), torch.randn(8, 200, 14, 14)).item() == pytest.approx(math.sqrt(2), rel=0.02)


def test_matched_maps_give_zero_and_scale_does_not_matter():
    maps, activations, aal = some()
    grown = aal.links(maps).detach().unflatten(-1, (4, 4))
    assert aal(maps, grown).item() == pytest.approx(0, abs=1e-15)
    assert torch.allclose(aal(maps, activations), aal(maps, 37.5 * activations), rtol=1e-12)
    with torch.no_grad():
        before = aal(maps, activations)
        aal.links.weight *= 5
        aal.links.bias *= 5
    assert torch.allclose(aal(maps, activations), before, rtol=1e-9)


def test_a_map_of_zeros_counts_one_and_gives_no_nan():
    maps, activations, aal = some()
    activations.zero_()
    maps.requires_grad_()
    aal.distance = "sq"
    loss = aal(maps, activations)
    loss.backward()
    assert loss.item() == pytest.approx(1, rel=1e-6)
    assert torch.isfinite(maps.grad).all()


def test_full_links_of_deit_s_and_efficientnet_b3():
    aal = AAL(72, 952)
    assert aal.links.weight.numel() == 68_544
    assert aal.links.weight.numel() + present(aal.links.bias).numel() == 69_496


def test_lambda():
    weight = aal.AALConfig().weight
    assert [round(weight.at(e), 2) for e in (0, 200, 299, 300)] == [2000, 267.96, 36.26, 35.54]
    assert weight.at(1) == 1980


def seen_by(name: str, **arguments: Any) -> tuple[Any, list[Attention], int]:
    """A network, its attention in a pass, and how many tokens come before its patches."""
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, **arguments).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data.mul_(3)
    with taps_of(model) as taps:
        model(torch.randn(2, 3, 32, 32))
    return model, taps.attention, model.num_prefix_tokens


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_readings_of_equation_3(name):
    _, attention, prefix = seen_by(name)
    scaled, full, plain = (class_maps(attention, prefix, how) for how in ("scaled", "full", "printed"))
    assert scaled.shape == (2, 6, 16)
    assert torch.allclose(scaled.sum(-1), torch.ones(2, 6))
    assert torch.allclose(plain.sum(-1), torch.ones(2, 6))
    assert torch.allclose(full / full.sum(-1, keepdim=True), scaled, atol=1e-6)
    assert (full.sum(-1) < 1).all()
    assert not torch.allclose(plain, scaled, atol=1e-3)
    q, k = present(attention[0].q), present(attention[0].k)
    first = (q[:, :, :1] @ k.transpose(-2, -1) * 16**-0.5).softmax(-1)[:, :, 0, prefix:]
    assert torch.allclose(full[:, :3], first, atol=1e-6)


def test_scaled_and_full_coincide_for_one_map_without_bias():
    _, attention, prefix = seen_by("vit_tiny_patch16_224")
    activations = torch.randn(2, 5, 4, 4)
    one = [class_maps(attention, prefix, how)[:, :1] for how in ("scaled", "full")]
    aal = AAL(1, 5)
    nn.init.zeros_(present(aal.links.bias))
    assert torch.allclose(aal(one[0], activations), aal(one[1], activations), rtol=1e-5)


def test_gradients_reach_the_student():
    model, attention, prefix = seen_by("vit_tiny_patch16_224")
    AAL(6, 5)(class_maps(attention, prefix, "scaled"), torch.randn(2, 5, 4, 4)).backward()
    assert all(block.attn.qkv.weight.grad.abs().sum() > 0 for block in model.blocks)
    assert model.head.weight.grad is None
