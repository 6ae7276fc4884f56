"""Taps of attention: class rows, queries and keys of plain ViTs are the network's own; others are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from precompute.taps import (
    AttentionTaps,
    Tap,
    TappedTeacher,
    attention_layers,
    check_attention,
    check_tap,
    class_row,
    prefix_roles,
)
from storage.errors import UserError
from tests.precompute.networks import HALF, SMALL, images, make, seen_attention, sharpened, small_vit, with_hooks

# ---------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_tiny_patch16_224", {"patch_size": 8}),
        ("vit_tiny_patch16_224", {"patch_size": 8, "qk_norm": True}),
        ("deit_tiny_distilled_patch16_224", {"patch_size": 8}),
        ("vit_small_patch14_reg4_dinov2", {"patch_size": 8}),
    ],
    ids=["plain", "qk-norm", "distilled", "registers"],
)
def test_class_row_is_the_row_of_the_matrix_that_the_unfused_kernel_uses(name: str, arguments: dict[str, Any]) -> None:
    network = sharpened(make(name, **SMALL, **arguments))
    batch = images()
    expected = seen_attention(network, batch)
    taps = AttentionTaps(network)
    with torch.no_grad():
        network(batch)
    for matrix, q, k, scale in zip(expected, taps.q, taps.k, taps.scales, strict=True):
        row = class_row(q, k, scale)
        torch.testing.assert_close(row, matrix[:, :, 0], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(row.sum(-1), torch.ones(row.shape[:2]), rtol=0, atol=1e-5)
        assert matrix[:, :, 0].std(-1).max() > 0.01, "attention that is nearly uniform would prove little"


def test_gradients_flow_through_class_rows_into_queries_and_keys() -> None:
    model = small_vit()
    taps = AttentionTaps(model, [2])
    model(images())
    row = class_row(taps.q[0], taps.k[0], taps.scales[0])
    to_q, to_k = torch.autograd.grad(row[..., 3].sum(), [taps.q[0], taps.k[0]], retain_graph=True)
    assert to_q[:, :, 0].abs().max() > 0
    assert to_k.abs().max() > 0
    assert to_q[:, :, 1:].abs().max() == 0, "only the class query has a part in the class row"
    row[..., 3].sum().backward()
    assert model.blocks[1].attn.qkv.weight.grad.abs().max() > 0


def test_attention_taps_leave_the_output_unchanged_and_can_be_removed() -> None:
    model = small_vit()
    with torch.no_grad():
        before = model(images())
        taps = AttentionTaps(model)
        during = model(images())
        q = taps.q[0]
        taps.remove()
        after = model(images())
    assert torch.equal(before, during)
    assert torch.equal(before, after)
    assert q.shape == (2, 3, 17, 16)
    with pytest.raises(KeyError):  # a hook that was not taken off would keep tensors
        taps.q  # noqa: B018
    assert not with_hooks(model)


def test_chosen_layers_are_those_layers() -> None:
    model = small_vit()
    every, some = AttentionTaps(model), AttentionTaps(model, [3, 1])
    with torch.no_grad():
        model(images())
    assert torch.equal(some.q[0], every.q[2])
    assert torch.equal(some.k[1], every.k[0])


@pytest.mark.parametrize("layers", [[0], [4], [1, 9]])
def test_a_layer_that_is_not_there_is_refused_with_those_that_are(layers: list[int]) -> None:
    with pytest.raises(UserError, match=f"layer {layers[-1]} was asked for; VisionTransformer has layers 1 to 3"):
        AttentionTaps(small_vit(), layers)


@pytest.mark.parametrize(
    ("name", "arguments", "roles"),
    [
        ("vit_tiny_patch16_224", {}, ("class",)),
        ("deit_tiny_distilled_patch16_224", {}, ("class", "distillation")),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 28}, ("class", *["register"] * 4)),
        ("vit_medium_patch16_reg4_gap_256", {}, ("register",) * 4),
        ("vit_base_patch16_siglip_224", {}, ()),
    ],
)
def test_prefix_tokens_have_roles_in_the_order_of_the_sequence(
    name: str, arguments: dict[str, Any], roles: tuple[str, ...]
) -> None:
    model = make(name, **{**SMALL, **arguments})
    assert prefix_roles(model) == roles
    size = arguments.get("img_size", 32)
    patches = (size // model.patch_embed.patch_size[0]) ** 2
    with torch.no_grad():
        assert model.forward_features(images(size)).shape[1] == len(roles) + patches


@pytest.mark.parametrize("tap", ["class_row", "class_token"])
def test_a_network_without_a_class_token_has_no_class_row_and_no_class_token(tap: str) -> None:
    model = make("vit_medium_patch16_reg4_gap_256", **SMALL)
    with pytest.raises(UserError, match="VisionTransformer: it has no class token"):
        TappedTeacher(model, [Tap(tap)], 32, input_size=32, mean=HALF, std=HALF)


def test_logits_of_a_network_without_a_classifier_are_refused() -> None:
    with pytest.raises(UserError, match="VisionTransformer: it has no classifier"):
        TappedTeacher(small_vit(num_classes=0), [Tap("logits")], 32, input_size=32, mean=HALF, std=HALF)


def test_a_teacher_gives_each_tap_as_the_network_itself_does() -> None:
    model = small_vit()
    taps = [
        Tap("logits"),
        Tap("class_token"),
        Tap("q", layers=(3, 1)),
        Tap("k", layers=(2,)),
        Tap("class_row", layers=(2, 3)),
    ]
    teacher = TappedTeacher(model, taps, 32, input_size=32, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4]).eval()
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    batch = (pixels.permute(0, 3, 1, 2) / 255 - mean) / std
    watch = AttentionTaps(model)
    with torch.no_grad():
        logits, token, q, k, rows = teacher(pixels)
        matrices = seen_attention(model, batch)
        close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(logits, model(batch), **close)
        torch.testing.assert_close(token, model.forward_features(batch)[:, 0], **close)
    torch.testing.assert_close(q, torch.stack([watch.q[2], watch.q[0]], 1), **close)
    torch.testing.assert_close(k, watch.k[1][:, None], **close)
    torch.testing.assert_close(rows, torch.stack([matrices[1][:, :, 0], matrices[2][:, :, 0]], 1), **close)


# ------------------------------------------------------------------------------- contract 12: taps are true


@pytest.mark.parametrize("arguments", [{}, {"qk_norm": True}, {"class_token": False, "global_pool": "avg"}])
def test_contract_12_attention_of_plain_and_qk_norm_vits_is_what_the_taps_give(arguments: dict[str, Any]) -> None:
    model = small_vit(**arguments)
    fused = [layer.fused_attn for layer in attention_layers(model)]
    assert check_attention(model, images()) <= 1e-6
    assert [layer.fused_attn for layer in attention_layers(model)] == fused, "the kernel is left as it was"


REFUSED = [
    ("eva02_tiny_patch14_224", {"img_size": 28}, "timm.models.eva.EvaAttention"),
    ("vit_base_patch16_rope_224", {}, "timm.layers.attention.AttentionRope"),
    ("vit_base_patch16_rope_mixed_224", {}, "timm.layers.attention.AttentionRope"),
    ("vit_relpos_base_patch16_cls_224", {}, "timm.models.vision_transformer_relpos.RelPosAttention"),
    ("vit_relpos_base_patch16_224", {}, "timm.models.vision_transformer_relpos.RelPosAttention"),
    ("beit_base_patch16_224", {}, "timm.models.beit.Attention"),
    ("cait_xxs24_224", {}, "timm.models.cait.TalkingHeadAttn"),
]


@pytest.mark.parametrize(("name", "arguments", "kind"), REFUSED, ids=[name for name, _, _ in REFUSED])
def test_contract_12_attention_with_something_after_the_tap_is_refused_by_name(
    name: str, arguments: dict[str, Any], kind: str
) -> None:
    arguments = {**SMALL, **arguments}
    model = make(name, **arguments)
    with pytest.raises(UserError) as caught:
        check_attention(model, images(arguments["img_size"]))
    assert kind in str(caught.value)
    assert str(caught.value).startswith(f"{type(model).__name__}: layer 1 ")


def test_contract_12_windowed_attention_is_refused_by_name() -> None:
    model = make("swin_tiny_patch4_window7_224", embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
    with pytest.raises(UserError, match=r"SwinTransformer: .*windowed"):
        check_attention(model, images(224))


def test_contract_12_a_difference_in_any_one_layer_is_found() -> None:
    model = small_vit()
    layer: Any = attention_layers(model)[2]
    layer.scale *= 1.01
    assert check_attention(model, images()) <= 1e-6  # the tap uses the layer's own scale
    layer.attn_drop.register_forward_pre_hook(lambda module, args: (args[0] * 1.01,))
    with pytest.raises(UserError, match=r"layer 3 .* differs .* by 0.0099 of its largest value"):
        check_attention(model, images())


def test_contract_12_leaves_no_hook_behind_when_it_refuses() -> None:
    model = make("vit_relpos_base_patch16_cls_224", **SMALL)
    with pytest.raises(UserError):
        check_attention(model, images())
    assert not with_hooks(model)


def test_an_unknown_tap_is_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no tap is called 'activatons'\n  Did you mean 'activations'"):
        check_tap("activatons")


def test_contract_12_values_that_the_layer_does_not_use_are_refused() -> None:
    model = small_vit()
    images = torch.randn(2, 3, 32, 32)
    assert check_attention(model, images, values=True) < 1e-4
    model.blocks[1].attn.norm.register_forward_pre_hook(lambda module, args: (args[0] * 1.01,))
    with pytest.raises(UserError, match=r"layer 2 .* its attention over the tapped values differs"):
        check_attention(model, images, values=True)


def test_tokens_need_a_vit() -> None:
    with pytest.raises(UserError, match="no attention rows"):
        TappedTeacher(make("resnet10t"), [Tap("tokens")], 32, input_size=32, mean=HALF, std=HALF)
