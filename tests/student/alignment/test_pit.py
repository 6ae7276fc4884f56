"""PiT as a student of AAL: layers of three grids and head counts, brought to one grid."""

from __future__ import annotations

import json
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.cli import main
from precompute.taps import (
    Tap,
    TappedTeacher,
    attention_layers,
    check_attention,
    prefix_roles,
)
from precompute.teachers import teacher
from storage.errors import UserError
from student.alignment.student_spec import student_spec
from student.losses.aal import AALConfig, AALLoss, class_maps
from student.losses.parts import aal_links
from tests.precompute.networks import attention_modules
from tests.student.attention import taps_of
from tests.student.losses.test_aal_links import B3, given
from tests.student.runs import run, u8, weights
from tests.typed import grad, present

SMALL: dict[str, Any] = {"img_size": 64, "patch_size": 16, "num_classes": 3}


def pit(name: str = "pit_s_224", **arguments: Any) -> Any:
    torch.manual_seed(0)
    model = timm.create_model(name, **arguments).eval()
    for layer in attention_modules(model):
        layer.qkv.weight.data.mul_(6)  # attention that is far from uniform
    return model


def test_contract_12_the_attention_from_pit_s_q_and_k_is_the_one_that_it_uses():
    pixels = torch.randn(2, 3, 64, 64)
    for name in ("pit_s_224", "pit_s_distilled_224"):
        model = pit(name, **SMALL)
        assert check_attention(model, pixels, attention_layers(model, 64, pooled=True)) < 1e-5
        model.transformers[1].blocks[2].attn.q_norm = Doubled()
        error = check_attention(model, pixels, attention_layers(model, 64, pooled=True))
        assert error < 1e-5, "what a norm does is before the tap"
    biased = pit(**SMALL)
    attention = biased.transformers[2].blocks[1].attn
    whole, mask = type(attention).forward, torch.randn(5, 5)
    attention.forward = lambda x, **_: whole(attention, x, attn_mask=mask)
    layers = attention_layers(biased, 64, pooled=True)
    assert [layer.number for layer in layers.layers if layer.biased] == [10]
    assert check_attention(biased, pixels, layers) < 1e-5, "a bias is part of what is read"
    attention.scale *= 1.01  # which the fused kernel does not hear of
    with pytest.raises(UserError, match=r"layer 10: the attention recomputed .* differs from what the network uses"):
        check_attention(biased, pixels, layers)


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def test_pit_s_has_90_maps_of_three_grids_and_85_680_links():
    shape = student_spec(pit(num_classes=3))
    assert shape.by_layer == ((3, 27),) * 2 + ((6, 14),) * 6 + ((12, 7),) * 4
    assert (shape.maps, shape.layers, shape.grid, shape.prefix) == (90, 12, 14, ("class",))
    method = AALLoss("aal", AALConfig(), shape, [given()])
    assert method.aal.links.weight.numel() == 85_680
    assert (
        "2 layers x 3 heads + 6 layers x 6 heads + 4 layers x 12 heads = 90 class rows" in present(method.row).student
    )
    assert "27x27 and 14x14 and 7x7, brought to 14x14 (bicubic)" in present(method.row).student
    distilled = student_spec(pit("pit_s_distilled_224", **SMALL))
    assert distilled.prefix == ("class", "distillation")
    assert distilled.by_layer == ((3, 7),) * 2 + ((6, 4),) * 6 + ((12, 2),) * 4


def test_grids_are_those_of_the_tokens_that_come():
    for size in (32, 64, 72, 224):
        model = pit("pit_ti_224", img_size=size, num_classes=3)
        with taps_of(model) as taps:
            model(torch.randn(1, 3, size, size))
        sides = [round((present(layer.q).shape[2] - len(prefix_roles(model))) ** 0.5) for layer in taps.attention]
        assert attention_layers(model, size, pooled=True).grids == tuple(sides)


def test_maps_of_each_layer_come_to_the_common_grid_as_an_image_would():
    model = pit(**SMALL)
    shape = student_spec(model)
    with taps_of(model) as taps:
        model(torch.randn(2, 3, 64, 64))
    method = AALLoss("aal", AALConfig(), shape, [given(grid=4)])
    resize = [method.get_buffer(f"resize_{side}") if side else None for side in method.sides]
    assert method.sides == [7, 7, *[None] * 6, 2, 2, 2, 2]
    found = class_maps(taps.attention, 1, "scaled", resize=resize)
    assert found.shape == (2, 90, 16)
    first = 0
    for layer, (heads, side) in zip(taps.attention, shape.by_layer, strict=True):
        q, k, scale = present(layer.q), present(layer.k), layer.scale
        maps = (q[:, :, :1] @ k[:, :, 1:].transpose(-2, -1) * scale).softmax(-1).view(2, heads, side, side)
        expected = F.interpolate(maps, (4, 4), mode="bicubic", align_corners=False).flatten(2)
        torch.testing.assert_close(found[:, first : first + heads], expected, rtol=1e-4, atol=1e-6)
        first += heads


def test_gradients_reach_every_layer_of_pit():
    model = pit(**SMALL)
    shape = student_spec(model)
    pixels = torch.randn(2, 3, 64, 64, requires_grad=True)
    with taps_of(model) as taps:
        model(pixels)
    method = AALLoss("aal", AALConfig(), shape, [given(grid=4)])
    resize = [method.get_buffer(f"resize_{side}") if side else None for side in method.sides]
    loss = method.aal(class_maps(taps.attention, 1, "scaled", resize=resize), torch.randn(2, 952, 4, 4))
    loss.backward()
    assert grad(pixels).abs().max() > 0
    for layer in attention_modules(model):
        width = layer.qkv.weight.shape[0] // 3
        assert layer.qkv.weight.grad[: 2 * width].abs().max() > 0
    assert model.head.weight.grad is None


def test_heads_of_each_layer_count_in_links_and_heat():
    layout = aal_links.Layout(B3.stages, B3.channels, (3, 3, 6, 6, 6, 6, 6, 6, 12, 12, 12, 12))
    choice = present(aal_links.kept("aal", "alpha", layout, 7).choice)
    assert layout.count(choice) == sum(
        channels * sum(layout.heads[first - 1 : last])
        for channels, (first, last) in zip(layout.channels, aal_links.TABLE["alpha"], strict=True)
    )


def test_pit_is_no_teacher_of_attention_and_says_why():
    with pytest.raises(UserError, match=r"PoolingVisionTransformer: .*it pools its patches between layers"):
        TappedTeacher(pit(**SMALL), [Tap("class_row")], 64, input_size=64, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert teacher.anatomy(pit(**SMALL), 64).network == "other"


PIT = [
    "student.model=pit_ti_224",
    "student.patch_size=4",
    "student.embed_dim=null",
    "student.depth=null",
    "student.num_heads=null",
]


def test_a_run_of_pit_with_aal_and_what_it_leaves(world, tmp_path, capsys):
    run(world, tmp_path / "run", "aal", u8(world), *PIT, "losses.aal.grid=8", "optim.epochs=1")
    found = aal_links.read(tmp_path / "run", None)
    assert found.layout == aal_links.Layout((1, 2, 3, 4), (8, 12, 16, 24), (2, 2, 4, 4, 4, 4, 4, 4, 8, 8, 8, 8))
    assert json.loads((tmp_path / "run" / "result.json").read_text())["samples"] == 300
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "cost", str(tmp_path / "run"), "--batch-size", "1", "--json"])
    said = capsys.readouterr()
    assert ended.value.code == 0, said.err
    student, joined = json.loads(said.out)["costs"]
    assert student["parameters"] == sum(t.numel() for name, t in weights(tmp_path / "run").items() if "last" in name)
    assert joined["macs"] == 60 * 60 * 8 * 8, "on the grid where the maps met"


def test_other_losses_refuse_pit_by_name(world, tmp_path):
    more = {"advit-l1": ["losses.advit.layers=uniform"], "attention-distill": ["student.global_pool=null"]}
    for recipe, loss in (("advit-l1", "advit"), ("attention-distill", "attention")):
        with pytest.raises(UserError, match=f"^{loss}: PoolingVisionTransformer pools its patches, so its layers"):
            run(world, tmp_path / recipe, recipe, *PIT, *more[recipe])
    with pytest.raises(UserError, match=r"target=activations,grid=2, …(?s:.*)`losses.aal.grid=8`"):
        run(world, tmp_path / "aal", "aal", u8(world), *PIT)
