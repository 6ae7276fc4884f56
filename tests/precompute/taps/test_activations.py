"""Taps read what the network uses: stages of CNNs, resized as interpolation does; others are refused by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from precompute.taps import Tap, TappedTeacher, cnn_stages, resize_matrix
from storage.errors import UserError
from tests.precompute.networks import HALF, channels, make, small_vit

if TYPE_CHECKING:
    from storage.store.manifests import Antialias

# ---------------------------------------------------------------------------------------------- CNN stages


def test_efficientnet_b3_has_the_seven_stages_and_952_maps_of_the_paper() -> None:
    stages = cnn_stages(make("efficientnet_b3"))
    assert [name for name, _ in stages] == [
        "blocks.0.1.bn2",
        "blocks.1.2.bn3",
        "blocks.2.2.bn3",
        "blocks.3.4.bn3",
        "blocks.4.4.bn3",
        "blocks.5.5.bn3",
        "blocks.6.1.bn3",
    ]
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
    last_blocks: list[Any] = [model.get_submodule(f"layer{i}.0") for i in (2, 3, 4)]
    assert all(isinstance(list(block.downsample.modules())[-1], nn.BatchNorm2d) for block in last_blocks)
    assert not any("downsample" in name for name, _ in cnn_stages(model))


def test_mobilenetv2_has_712_maps() -> None:
    found = [channels(norm) for _, norm in cnn_stages(make("mobilenetv2_100"))]
    assert found == [16, 24, 32, 64, 96, 160, 320]
    assert sum(found) == 712


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("convnext_atto", "ConvNeXt"),
        ("vit_tiny_patch16_224", "VisionTransformer"),
        ("swin_tiny_patch4_window7_224", "SwinTransformer"),
    ],
)
def test_networks_without_normed_maps_are_refused_by_name_as_activation_teachers(name: str, says: str) -> None:
    small = {"embed_dim": 24} if "vit" in name or "swin" in name else {}
    with pytest.raises(UserError, match=f"^{says}: "):
        cnn_stages(make(name, **small))


def test_activations_are_read_before_the_shortcut_is_added_in_place() -> None:
    model = make("resnet10t", channels=[8, 12, 16, 24], stem_width=8, num_classes=3)
    teacher = TappedTeacher(
        model, [Tap("activations", layers=(4,), grid=2)], 64, input_size=64, mean=HALF, std=HALF
    ).eval()
    norm_input: list[torch.Tensor] = []
    norm: Any = cnn_stages(model)[3][1]
    norm.register_forward_pre_hook(lambda module, args: norm_input.append(args[0].clone()))
    with torch.no_grad():
        found = teacher(torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8))[0]
        expected = F.batch_norm(norm_input[-1], norm.running_mean, norm.running_var, norm.weight, norm.bias)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("antialias", [False, "all", True])
@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv2_050"])
def test_block_maps_are_the_stage_s_output_after_the_residual_sum(name: str, antialias: Antialias) -> None:
    """On a grid of 3, which the last stage is enlarged to; True is what older stores hold: a stage that is enlarged is
    not antialiased."""
    model = make(name, num_classes=3)
    taps = [
        Tap("activations", layers=None, grid=3, at="block", antialias=antialias),
        Tap("activations", layers=(2,), grid=3),
    ]
    teacher = TappedTeacher(model, taps, 64, input_size=64, mean=HALF, std=HALF).eval()
    whole = [m for n, m in model.named_children() if n.startswith("layer")] or list(model.blocks)
    outputs: list[torch.Tensor] = []
    for stage in whole:
        stage.register_forward_hook(lambda module, args, output: outputs.append(output.clone()))
    with torch.no_grad():
        found, norm = teacher(torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8))
    assert (outputs[0].shape[-1], outputs[-1].shape[-1]) in ((16, 2), (32, 2))
    as_pytorch = {"align_corners": False, "antialias": bool(antialias)}
    resized = [F.interpolate(o, (3, 3), mode="bicubic", **as_pytorch) for o in outputs]
    if antialias is True:
        enlarged = [o.shape[-1] == 2 for o in outputs]
        plain = [F.interpolate(o, (3, 3), mode="bicubic", align_corners=False) for o in outputs]
        assert all((a - b).abs().max() > 1e-3 for a, b, one in zip(plain, resized, enlarged, strict=True) if one)
        resized = [a if one else b for a, b, one in zip(plain, resized, enlarged, strict=True)]
    torch.testing.assert_close(found, torch.cat(resized, 1), rtol=1e-4, atol=1e-5)
    assert [count for *_, count, _ in teacher.stages(taps[0])] == [o.shape[1] for o in outputs]
    first = outputs[0].shape[1]
    assert (norm - found[:, first : first + norm.shape[1]]).abs().max() > 1e-2, "the sum is more than its last summand"


def test_block_maps_of_the_paper_s_teachers_are_as_many() -> None:
    for name, maps in (("efficientnet_b3", [24, 32, 48, 96, 136, 232, 384]), ("resnet34", [64, 128, 256, 512])):
        teacher = TappedTeacher(
            make(name), [Tap("activations", layers=None, grid=2, at="block")], 64, input_size=64, mean=HALF, std=HALF
        )
        assert [count for *_, count, _ in teacher.stages(teacher.taps[0])] == maps
        assert sum(maps) == {"efficientnet_b3": 952, "resnet34": 960}[name]


def test_the_activations_tap_is_each_stage_resized_to_the_grid_in_order() -> None:
    model = make("resnet10t", channels=[8, 12, 16, 24], stem_width=8, num_classes=3)
    teacher = TappedTeacher(
        model, [Tap("activations", layers=(4, 1), grid=3)], 64, input_size=64, mean=HALF, std=HALF
    ).eval()
    pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    maps: dict[str, torch.Tensor] = {}
    for name, norm in cnn_stages(model):
        norm.register_forward_hook(lambda module, args, output, name=name: maps.update({name: output.clone()}))
    with torch.no_grad():
        found = teacher(pixels)[0]
    stages = [maps[name] for name, _ in cnn_stages(model)]
    expected = [F.interpolate(stage, (3, 3), mode="bicubic", align_corners=False) for stage in (stages[3], stages[0])]
    torch.testing.assert_close(found, torch.cat(expected, 1), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------- resizing


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("sizes", [(7, 8), (7, 14), (112, 14), (14, 8), (5, 3), (1, 4), (9, 1), (32, 64), (100, 33)])
def test_two_matrix_products_are_bicubic_interpolation(sizes: tuple[int, int], antialias: bool) -> None:
    size_in, size_out = sizes
    maps = torch.rand(2, 3, size_in, size_in, generator=torch.Generator().manual_seed(0))
    matrix = resize_matrix(size_in, size_out, antialias)
    assert matrix.shape == (size_out, size_in)
    new = (size_out, size_out)
    expected = F.interpolate(maps.double(), new, mode="bicubic", align_corners=False, antialias=antialias)
    torch.testing.assert_close((matrix @ maps @ matrix.T).double(), expected, rtol=0, atol=1e-6)
    if antialias:  # Pillow's bicubic always is
        images = [Image.fromarray(one).resize(new, Image.Resampling.BICUBIC) for one in maps.flatten(0, 1).numpy()]
        pillow = torch.tensor(np.stack([np.asarray(one) for one in images])).view_as(expected)
        torch.testing.assert_close(matrix @ maps @ matrix.T, pillow, rtol=0, atol=1e-5)


@pytest.mark.parametrize("antialias", [False, True])
def test_resizing_to_the_same_size_is_the_identity(antialias: bool) -> None:
    assert torch.equal(resize_matrix(14, 14, antialias), torch.eye(14))


# ---------------------------------------------------------------------------------------------- what belongs together


def test_the_taps_of_one_network_belong_together() -> None:
    """Each tap, computed from the others."""
    model = small_vit()
    taps = [Tap(name) for name in ("q", "k", "v", "class_row", "attention", "tokens", "class_token", "embedding")]
    taps += [Tap("tokens", layers=(1, 3)), Tap("attention", layers=(2,)), Tap("logits")]
    teacher = TappedTeacher(model, taps, 32, input_size=32, mean=HALF, std=HALF).eval()
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
        begin = model.norm_pre(model._pos_embed(model.patch_embed(x)))  # noqa: SLF001 - timm has it nowhere else
        block = model.blocks[0]
        mixed = begin + block.attn.proj((attention[:, 0] @ v[:, 0]).transpose(1, 2).flatten(2))
        assert torch.allclose(mixed + block.mlp(block.norm2(mixed)), streams[:, 0], atol=1e-5)


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_an_embedding_is_what_the_classifier_is_given(name: str) -> None:
    sizes = {"img_size": 32, "patch_size": 8, "depth": 2} if "patch" in name else {}
    model = make(name, num_classes=5, **sizes)
    teacher = TappedTeacher(model, [Tap("embedding"), Tap("logits")], 32, input_size=32, mean=HALF, std=HALF).eval()
    embedding, logits = teacher(torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8))
    if "distilled" in name:  # the mean of two tokens has no classifier of its own
        assert embedding.shape == (3, model.num_features)
    else:
        classifier = model.get_classifier()
        assert torch.allclose(classifier(embedding), logits, atol=1e-5)
