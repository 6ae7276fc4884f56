"""Taps read what the network uses: stages of CNNs, attention of plain ViTs; everything else is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from precompute.taps import (
    AttentionTaps,
    Tap,
    TappedTeacher,
    attention_layers,
    check_attention,
    check_tap,
    class_row,
    cnn_stages,
    prefix_roles,
    resize_matrix,
    timm,
)
from storage.errors import UserError

SMALL: dict[str, Any] = {"img_size": 32, "depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
HALF = (0.5, 0.5, 0.5)


def make(name: str, **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, **arguments).eval()


def small_vit(**changes: Any) -> nn.Module:
    """A plain ViT with attention that is far from uniform."""
    return sharpened(make("vit_tiny_patch16_224", **{**SMALL, "patch_size": 8, **changes}))


def sharpened(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        if model.cls_token is not None:
            model.cls_token.normal_()
        for block in model.blocks:
            block.attn.qkv.weight.mul_(4)
    return model


def images(size: int = 32, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def channels(module: nn.Module) -> int:
    return int(getattr(module, "num_features", None) or module.num_channels)


def seen_attention(model: nn.Module, batch: torch.Tensor) -> list[torch.Tensor]:
    """The attention matrices `[B, H, N, N]` that go into the dropout of each layer's unfused kernel."""
    seen: list[torch.Tensor] = []
    handles = []
    for layer in attention_layers(model):
        layer.fused_attn = False
        handles.append(layer.attn_drop.register_forward_pre_hook(lambda module, args: seen.append(args[0])))
    with torch.no_grad():
        model(batch)
    for handle in handles:
        handle.remove()
    return seen


# ---------------------------------------------------------------------------------------------- CNN stages


def test_efficientnet_b3_has_the_seven_stages_and_952_maps_of_the_paper() -> None:
    stages = cnn_stages(make("efficientnet_b3"))
    assert [name for name, _ in stages] == [
        "blocks.0.1.bn2", "blocks.1.2.bn3", "blocks.2.2.bn3", "blocks.3.4.bn3", "blocks.4.4.bn3", "blocks.5.5.bn3",
        "blocks.6.1.bn3",
    ]  # fmt: skip
    assert [channels(norm) for _, norm in stages] == [24, 32, 48, 96, 136, 232, 384]
    assert sum(channels(norm) for _, norm in stages) == 952


@pytest.mark.parametrize(
    ("name", "modules", "maps"),
    [
        ("resnet34", ["layer1.2.bn2", "layer2.3.bn2", "layer3.5.bn2", "layer4.2.bn2"], [64, 128, 256, 512]),
        ("resnet10t", [f"layer{i}.0.bn2" for i in (1, 2, 3, 4)], [64, 128, 256, 512]),
        ("regnety_002", ["s1.b1.conv3.bn", "s2.b1.conv3.bn", "s3.b4.conv3.bn", "s4.b7.conv3.bn"], [24, 56, 152, 368]),
    ],
)
def test_stages_are_read_after_the_last_norm_of_the_last_block(name: str, modules: list[str], maps: list[int]) -> None:
    stages = cnn_stages(make(name))
    assert [module for module, _ in stages] == modules
    assert [channels(norm) for _, norm in stages] == maps


def test_a_downsample_in_the_last_block_is_not_mistaken_for_its_last_norm() -> None:
    model = make("resnet10t")
    last_blocks = [model.get_submodule(f"layer{i}.0") for i in (2, 3, 4)]
    assert all(isinstance(list(block.downsample.modules())[-1], nn.BatchNorm2d) for block in last_blocks)
    assert not any("downsample" in name for name, _ in cnn_stages(model))


def test_mobilenetv2_has_712_maps() -> None:
    found = [channels(norm) for _, norm in cnn_stages(make("mobilenetv2_100"))]
    assert found == [16, 24, 32, 64, 96, 160, 320]
    assert sum(found) == 712


@pytest.mark.parametrize(
    ("name", "says"),
    [("convnext_atto", "ConvNeXt"), ("vit_tiny_patch16_224", "VisionTransformer"),
     ("swin_tiny_patch4_window7_224", "SwinTransformer")],
)  # fmt: skip
def test_networks_without_normed_maps_are_refused_by_name_as_activation_teachers(name: str, says: str) -> None:
    small = {"embed_dim": 24} if "vit" in name or "swin" in name else {}
    with pytest.raises(UserError, match=f"^{says}: "):
        cnn_stages(make(name, **small))


def test_activations_are_read_before_the_shortcut_is_added_in_place() -> None:
    model = make("resnet10t", channels=[8, 12, 16, 24], stem_width=8, num_classes=3)
    teacher = TappedTeacher(model, [Tap("activations", (4,), 2)], 64, 64, HALF, HALF).eval()
    norm_input: list[torch.Tensor] = []
    norm = cnn_stages(model)[3][1]
    norm.register_forward_pre_hook(lambda module, args: norm_input.append(args[0].clone()))
    with torch.no_grad():
        found = teacher(torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8))[0]
        expected = F.batch_norm(norm_input[-1], norm.running_mean, norm.running_var, norm.weight, norm.bias)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv2_050"])
def test_block_maps_are_the_stage_s_output_after_the_residual_sum(name: str, antialias: bool) -> None:
    model = make(name, num_classes=3)
    taps = [Tap("activations", None, 2, at="block", antialias=antialias), Tap("activations", (2,), 2)]
    teacher = TappedTeacher(model, taps, 64, 64, HALF, HALF).eval()
    whole = [m for n, m in model.named_children() if n.startswith("layer")] or list(model.blocks)
    outputs: list[torch.Tensor] = []
    for stage in whole:
        stage.register_forward_hook(lambda module, args, output: outputs.append(output.clone()))
    with torch.no_grad():
        found, norm = teacher(torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8))
    resized = [F.interpolate(o, (2, 2), mode="bicubic", align_corners=False,
                             antialias=antialias and o.shape[-1] > 2) for o in outputs]  # fmt: skip
    torch.testing.assert_close(found, torch.cat(resized, 1), rtol=1e-4, atol=1e-5)
    assert [count for _, _, count in teacher.stages(taps[0])] == [o.shape[1] for o in outputs]
    first = outputs[0].shape[1]
    assert (norm - found[:, first : first + norm.shape[1]]).abs().max() > 1e-2, "the sum is more than its last summand"


def test_block_maps_of_the_paper_s_teachers_are_as_many() -> None:
    for name, maps in (("efficientnet_b3", [24, 32, 48, 96, 136, 232, 384]), ("resnet34", [64, 128, 256, 512])):
        teacher = TappedTeacher(make(name), [Tap("activations", None, 2, at="block")], 64, 64, HALF, HALF)
        assert [count for _, _, count in teacher.stages(teacher.taps[0])] == maps
        assert sum(maps) == {"efficientnet_b3": 952, "resnet34": 960}[name]


def test_the_activations_tap_is_each_stage_resized_to_the_grid_in_order() -> None:
    model = make("resnet10t", channels=[8, 12, 16, 24], stem_width=8, num_classes=3)
    teacher = TappedTeacher(model, [Tap("activations", (4, 1), 3)], 64, 64, HALF, HALF).eval()
    pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    maps: dict[str, torch.Tensor] = {}
    for name, norm in cnn_stages(model):
        norm.register_forward_hook(lambda module, args, output, name=name: maps.update({name: output.clone()}))
    with torch.no_grad():
        found = teacher(pixels)[0]
    stages = [maps[name] for name, _ in cnn_stages(model)]
    expected = [F.interpolate(stage, (3, 3), mode="bicubic", align_corners=False) for stage in (stages[3], stages[0])]
    torch.testing.assert_close(found, torch.cat(expected, 1), rtol=1e-5, atol=1e-5)


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
    assert not taps._q, "a hook that was not taken off would keep tensors"
    layers = attention_layers(model)
    assert not any(part._forward_hooks for layer in layers for part in (layer.q_norm, layer.k_norm))


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
        TappedTeacher(model, [Tap(tap)], 32, 32, HALF, HALF)


def test_logits_of_a_network_without_a_classifier_are_refused() -> None:
    with pytest.raises(UserError, match="VisionTransformer: it has no classifier"):
        TappedTeacher(small_vit(num_classes=0), [Tap("logits")], 32, 32, HALF, HALF)


def test_a_teacher_gives_each_tap_as_the_network_itself_does() -> None:
    model = small_vit()
    taps = [Tap("logits"), Tap("class_token"), Tap("q", (3, 1)), Tap("k", (2,)), Tap("class_row", (2, 3))]
    teacher = TappedTeacher(model, taps, 32, 32, [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]).eval()
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    batch = (pixels.permute(0, 3, 1, 2) / 255 - mean) / std
    watch = AttentionTaps(model)
    with torch.no_grad():
        logits, token, q, k, rows = teacher(pixels)
        matrices = seen_attention(model, batch)
        close = {"rtol": 1e-4, "atol": 1e-5}
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
    attention_layers(model)[2].scale *= 1.01
    assert check_attention(model, images()) <= 1e-6  # the tap uses the layer's own scale
    attention_layers(model)[2].attn_drop.register_forward_pre_hook(lambda module, args: (args[0] * 1.01,))
    with pytest.raises(UserError, match=r"layer 3 .* differs .* by 0.0099 of its largest value"):
        check_attention(model, images())


def test_contract_12_leaves_no_hook_behind_when_it_refuses() -> None:
    model = make("vit_relpos_base_patch16_cls_224", **SMALL)
    with pytest.raises(UserError):
        check_attention(model, images())
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks


def test_an_unknown_tap_is_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no tap is called 'activatons'. Did you mean 'activations'"):
        check_tap("activatons")


# ---------------------------------------------------------------------------------------------- resizing


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("sizes", [(7, 14), (112, 14), (14, 8), (5, 3), (1, 4), (9, 1), (32, 64), (100, 33)])
def test_two_matrix_products_are_bicubic_interpolation(sizes: tuple[int, int], antialias: bool) -> None:
    size_in, size_out = sizes
    maps = torch.rand(2, 3, size_in, size_in, generator=torch.Generator().manual_seed(0))
    matrix = resize_matrix(size_in, size_out, antialias)
    assert matrix.shape == (size_out, size_in)
    antialias = antialias and size_out < size_in
    new = (size_out, size_out)
    expected = F.interpolate(maps.double(), new, mode="bicubic", align_corners=False, antialias=antialias)
    torch.testing.assert_close((matrix @ maps @ matrix.T).double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("antialias", [False, True])
def test_resizing_to_the_same_size_is_the_identity(antialias: bool) -> None:
    assert torch.equal(resize_matrix(14, 14, antialias), torch.eye(14))


# ---------------------------------------------------------------------------------------------- what belongs together


def test_the_taps_of_one_network_belong_together() -> None:
    """Each tap, computed from the others."""
    model = small_vit()
    taps = [Tap(name) for name in ("q", "k", "v", "class_row", "attention", "tokens", "class_token", "embedding")]
    taps += [Tap("tokens", (1, 3)), Tap("attention", (2,)), Tap("logits")]
    teacher = TappedTeacher(model, taps, 32, 32, HALF, HALF).eval()
    images = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    with torch.no_grad():
        q, k, v, row, attention, tokens, token, embedding, streams, second, logits = teacher(images)
        scale = teacher.scales(Tap("q"))[0]
        assert torch.allclose(attention, (q @ k.transpose(-2, -1) * scale).softmax(-1), atol=1e-6)
        assert torch.allclose(attention[..., 0, :], row, atol=1e-6)
        assert torch.equal(second[:, 0], attention[:, 1])
        assert torch.allclose(attention.sum(-1), torch.ones(()), atol=1e-5)
        assert torch.equal(tokens[:, 0, 0], token)
        assert tokens.shape == (4, 1, 17, 48)
        assert torch.allclose(model.norm(streams[:, 1]), tokens[:, 0], atol=1e-6)
        assert not torch.allclose(streams[:, 0], streams[:, 1], atol=1e-2)
        assert torch.allclose(model.head(embedding), logits, atol=1e-6)
        # what the first layer adds to its residual stream, from its attention and values
        x = teacher.prepare(images)
        begin = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        block = model.blocks[0]
        mixed = begin + block.attn.proj((attention[:, 0] @ v[:, 0]).transpose(1, 2).flatten(2))
        assert torch.allclose(mixed + block.mlp(block.norm2(mixed)), streams[:, 0], atol=1e-5)


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_an_embedding_is_what_the_classifier_is_given(name: str) -> None:
    sizes = {"img_size": 32, "patch_size": 8, "depth": 2} if "patch" in name else {}
    model = make(name, num_classes=5, **sizes)
    teacher = TappedTeacher(model, [Tap("embedding"), Tap("logits")], 32, 32, HALF, HALF).eval()
    embedding, logits = teacher(torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8))
    if "distilled" in name:  # the mean of two tokens has no classifier of its own
        assert embedding.shape == (3, model.num_features)
    else:
        classifier = model.get_classifier()
        assert torch.allclose(classifier(embedding), logits, atol=1e-5)


def test_contract_12_values_that_the_layer_does_not_use_are_refused() -> None:
    model = small_vit()
    images = torch.randn(2, 3, 32, 32)
    assert check_attention(model, images, values=True) < 1e-4
    model.blocks[1].attn.norm.register_forward_pre_hook(lambda module, args: (args[0] * 1.01,))
    with pytest.raises(UserError, match=r"layer 2 .* its attention over the tapped values differs"):
        check_attention(model, images, values=True)


def test_tokens_need_a_vit() -> None:
    with pytest.raises(UserError, match="no attention rows"):
        TappedTeacher(make("resnet10t"), [Tap("tokens")], 32, 32, HALF, HALF)
