"""Taps of attention: what is read at the kernel is what the network uses, in whichever family; others are refused."""

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
    prefix_roles,
)
from storage.errors import UserError
from tests.precompute.networks import (
    HALF,
    SMALL,
    attention_modules,
    images,
    make,
    seen_attention,
    sharpened,
    small_vit,
    with_hooks,
)


def tapped(model: nn.Module, batch: torch.Tensor, *numbers: int) -> AttentionTaps:
    """Taps of a network's layers, after it has run."""
    layers = attention_layers(model, batch.shape[-1]).layers
    taps = AttentionTaps([layers[n - 1] for n in numbers or range(1, len(layers) + 1)])
    with torch.no_grad(), taps:
        model(batch)
    return taps


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("vit_tiny_patch16_224", {"patch_size": 8}),
    "qk-norm": ("vit_tiny_patch16_224", {"patch_size": 8, "qk_norm": True}),
    "distilled": ("deit_tiny_distilled_patch16_224", {"patch_size": 8}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"patch_size": 8}),
    "DINOv3": ("vit_small_patch16_dinov3", {"patch_size": 8}),
    "EVA-02": ("eva02_tiny_patch14_224", {"patch_size": 8}),
    "rotary": ("vit_base_patch16_rope_reg1_gap_256", {"patch_size": 8}),
    "mixed rotary": ("vit_base_patch16_rope_mixed_224", {"patch_size": 8}),
    "PE-core": ("vit_pe_core_tiny_patch16_384", {"patch_size": 8}),
    "BEiT": ("beit_base_patch16_224", {"patch_size": 8}),
    "BEiTv2": ("beitv2_base_patch16_224", {"patch_size": 8}),
    "relative positions": ("vit_relpos_base_patch16_224", {"patch_size": 8}),
    "relative positions, class token": ("vit_relpos_base_patch16_cls_224", {"patch_size": 8}),
    "shared relative positions": ("vit_srelpos_small_patch16_224", {"patch_size": 8}),
    "SigLIP": ("vit_base_patch16_siglip_224", {"patch_size": 8}),
    "SAM": ("samvit_base_patch16", {"patch_size": 8, "window_size": 3, "global_attn_indexes": (0, 2)}),
    "CaiT": ("cait_xxs24_224", {"patch_size": 8}),
    "XCiT": ("xcit_nano_12_p8_224", {}),
    "ConViT": ("convit_tiny", {"patch_size": 8, "local_up_to_layer": 1}),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Any:
    name, arguments = FAMILIES[request.param]
    return request.param, sharpened(make(name, **{**SMALL, **arguments}))


def test_contract_12_rows_from_the_kernels_arguments_are_those_of_the_unfused_network(family: tuple[str, Any]) -> None:
    _, network = family
    batch, found = images(), attention_layers(network, 32)
    taps = tapped(network, batch)
    shapes = {(layer.heads, layer.queries, layer.tokens) for layer in found.layers}
    expected = seen_attention(network, batch)
    expected = [rows.reshape(2, -1, *rows.shape[-2:]) for rows in expected]
    expected = [rows for rows in expected if rows.ndim == 4 and (rows.shape[1], *rows.shape[2:]) in shapes]
    for matrix, attention in zip(expected, taps.attention, strict=True):
        rows = attention.rows()
        assert (rows - matrix).abs().max() <= 1e-5 * matrix.abs().max()
        torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:3]), rtol=0, atol=1e-5)
        assert matrix.std(-1).max() > 0.005, "attention that is nearly uniform would prove little"
    assert check_attention(network, batch, found) <= 1e-5


def test_a_class_row_is_computed_alone_and_is_the_same(family: tuple[str, Any]) -> None:
    _, network = family
    for attention in tapped(network, images()).attention:
        alone = attention.rows(slice(0, 1))
        assert alone.shape[2] == 1
        torch.testing.assert_close(alone[:, :, 0], attention.rows()[:, :, 0], rtol=1e-5, atol=1e-7)
        if attention.q is not None:
            heads = attention.of_heads([0, 2])
            torch.testing.assert_close(heads.rows(), attention.rows()[:, [0, 2]], rtol=1e-5, atol=1e-7)


def test_reading_leaves_the_output_as_it_is_and_no_hook_behind(family: tuple[str, Any]) -> None:
    _, model = family
    with torch.no_grad():
        before = model(images())
        taps = AttentionTaps(attention_layers(model, 32).layers)
        with taps:
            during = model(images())
        after = model(images())
    assert torch.equal(before, during)
    assert torch.equal(before, after)
    assert not with_hooks(model)
    taps.clear()
    with pytest.raises(KeyError):  # tensors that were kept would cost memory
        taps.attention  # noqa: B018


UNFUSED = ["plain", "registers", "DINOv3", "BEiT", "SAM", "CaiT", "ConViT"]


@pytest.mark.parametrize("name", UNFUSED)
def test_an_unfused_kernel_gives_what_timms_own_unfused_layers_give(name: str) -> None:
    model, arguments = FAMILIES[name]
    network = sharpened(make(model, **{**SMALL, **arguments}))
    taps = AttentionTaps(attention_layers(network, 32).layers, kernel="unfused")
    with torch.no_grad(), taps:
        ours = network(images())
    for layer in attention_modules(network):
        layer.fused_attn = False
    with torch.no_grad():
        theirs = network(images())
    assert torch.equal(ours, theirs) or name in ("BEiT", "SAM")  # timm adds their bias in another place
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_gradients_flow_through_class_rows_into_queries_and_keys() -> None:
    model = small_vit()
    taps = AttentionTaps(attention_layers(model, 32).layers[1:2])
    with taps:
        model(images())
    (attention,) = taps.attention
    row = attention.rows(slice(0, 1))
    assert attention.q is not None
    assert attention.k is not None
    to_q, to_k = torch.autograd.grad(row[..., 3].sum(), [attention.q, attention.k], retain_graph=True)
    assert to_q[:, :, 0].abs().max() > 0
    assert to_k.abs().max() > 0
    assert to_q[:, :, 1:].abs().max() == 0, "only the class query has a part in the class row"
    row[..., 3].sum().backward()
    assert model.blocks[1].attn.qkv.weight.grad.abs().max() > 0


def test_scores_of_another_scale_are_not_made_up_for_a_layer_without_a_kernel() -> None:
    name, arguments = FAMILIES["ConViT"]
    (attention, *_) = tapped(make(name, **{**SMALL, **arguments}), images()).attention
    with pytest.raises(UserError, match="is not known"):
        attention.scores(scale=1.0)


def test_chosen_layers_are_those_layers() -> None:
    model = small_vit()
    every, some = tapped(model, images()).attention, tapped(model, images(), 3, 1).attention
    assert torch.equal(some[0].rows(), every[2].rows())
    assert torch.equal(some[1].rows(), every[0].rows())


@pytest.mark.parametrize("layers", [(0,), (4,), (1, 9)])
def test_a_layer_that_is_not_there_is_refused_with_those_that_are(layers: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=f"layer {layers[-1]} was asked for; VisionTransformer has layers 1 to 3"):
        TappedTeacher(small_vit(), [Tap("q", layers=layers)], 32, input_size=32, mean=HALF, std=HALF)


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
    normed: dict[tuple[str, int], torch.Tensor] = {}  # what timm's q_norm and k_norm give, by hooks
    for i, block in enumerate(model.blocks):
        for part in ("q", "k"):
            getattr(block.attn, f"{part}_norm").register_forward_hook(
                lambda _m, _a, output, key=(part, i): normed.__setitem__(key, output)
            )
    with torch.no_grad():
        logits, token, q, k, rows = teacher(pixels)
        matrices = seen_attention(model, batch)
        close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(logits, model(batch), **close)
        torch.testing.assert_close(token, model.forward_features(batch)[:, 0], **close)
    torch.testing.assert_close(q, torch.stack([normed["q", 2], normed["q", 0]], 1), **close)
    torch.testing.assert_close(k, normed["k", 1][:, None], **close)
    torch.testing.assert_close(rows, torch.stack([matrices[1][:, :, 0], matrices[2][:, :, 0]], 1), **close)


# ------------------------------------------------------------------------------- contract 12: taps are true


@pytest.mark.parametrize(
    ("family", "tap", "reason"),
    [
        ("BEiT", "q", "adds a bias to its scores"),
        ("relative positions, class token", "k", "adds a bias to its scores"),
        ("SAM", "q", "adds a bias to its scores"),
        ("CaiT", "attention", "the class token alone attends"),
        ("XCiT", "q", "the class token alone attends"),
        ("ConViT", "q", "calls no attention kernel"),
    ],
)
def test_a_tap_that_would_not_give_the_attention_is_refused_with_the_reason(family: str, tap: str, reason: str) -> None:
    name, arguments = FAMILIES[family]
    model = make(name, **{**SMALL, **arguments})
    with pytest.raises(UserError, match=reason) as caught:
        TappedTeacher(model, [Tap(tap)], 32, input_size=32, mean=HALF, std=HALF)
    assert str(caught.value).startswith(f"{type(model).__name__}: ")


SWIN: dict[str, Any] = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("swin_tiny_patch4_window7_224", SWIN, r"pools its patches between layers \(56, 28, 14, 7 a side\)"),
        ("hiera_tiny_224", {"embed_dim": 24, "stages": (1, 1, 1, 1)}, "pools its patches"),
        ("pvt_v2_b0", {}, "pools its patches"),
        ("pit_s_224", {}, "pools its patches"),
        ("mixer_s32_224", {}, "calls no attention kernel"),
        ("resnet10t", {}, "calls no attention kernel"),
    ],
)
def test_windowed_and_pooled_attention_is_refused_with_the_reason(
    name: str, arguments: dict[str, Any], reason: str
) -> None:
    model = make(name, **arguments)
    with pytest.raises(UserError, match=f"^{type(model).__name__}: .*{reason}"):
        attention_layers(model, 224)


def test_contract_12_a_difference_in_any_one_layer_is_found() -> None:
    model = small_vit()
    found = attention_layers(model, 32)
    assert check_attention(model, images(), found) <= 1e-6
    model.blocks[2].attn.scale *= 1.01  # which the fused kernel does not hear of
    with pytest.raises(UserError, match=r"layer 3: the attention recomputed .* differs .*"):
        check_attention(model, images(), found)


def test_contract_12_attention_that_is_changed_before_it_meets_the_values_is_refused() -> None:
    model = small_vit()
    found = attention_layers(model, 32)
    model.blocks[1].attn.attn_drop.register_forward_pre_hook(lambda _module, args: (args[0] * 1.01,))
    with pytest.raises(UserError, match="layer 2: what it makes of its attention cannot be seen"):
        check_attention(model, images(), found)


class HandWritten(nn.Module):
    """Attention as people write it by hand: no kernel, no dropout, no names of timm."""

    num_prefix_tokens = 1
    cls_token = nn.Parameter(torch.randn(1, 1, 24))

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, 24, 8, 8)
        self.layers = nn.ModuleList(nn.Linear(24, 72) for _ in range(2))
        self.kernel: dict[str, Any] = {}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        for layer in self.layers:
            q, k, v = layer(x).reshape(*x.shape[:2], 3, 3, 8).permute(2, 0, 3, 1, 4)
            if self.kernel:
                out = F.scaled_dot_product_attention(q, k, v, **self.kernel)
            else:
                out = torch.softmax(4 * q @ k.transpose(-2, -1), dim=-1) @ v
            x = x + out.transpose(1, 2).flatten(2)
        return x[:, 0]


def test_a_network_of_ones_own_is_read_without_a_kernel_and_without_names() -> None:
    model = HandWritten().eval()
    found = attention_layers(model, 32)
    assert [(layer.heads, layer.tokens, layer.fused) for layer in found.layers] == [(3, 17, False)] * 2
    assert check_attention(model, images(), found) <= 1e-6


def test_a_causal_mask_is_part_of_the_attention() -> None:
    model = HandWritten().eval()
    model.kernel = {"is_causal": True}
    found = attention_layers(model, 32)
    assert all(layer.biased for layer in found.layers)
    assert check_attention(model, images(), found) <= 1e-5
    rows = tapped(model, images()).attention[0].rows()
    assert torch.equal(rows, rows.tril())


def test_a_scale_of_its_own_is_read() -> None:
    model = HandWritten().eval()
    model.kernel = {"scale": 2}
    found = attention_layers(model, 32)
    assert [layer.scale for layer in found.layers] == [2.0, 2.0]
    assert check_attention(model, images(), found) <= 1e-5
