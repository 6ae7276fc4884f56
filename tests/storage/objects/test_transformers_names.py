"""Files with the names of Hugging Face transformers: timm's networks then compute what transformers' formulas say."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from storage.errors import UserError
from storage.objects.rename import rename_to_fit
from storage.objects.state_dict import load_weights
from storage.objects.weights_file import WeightsFile

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

State = dict[str, Tensor]
D, HEADS, DEPTH, PATCH, GRID, HIDDEN = 24, 3, 2, 8, 4, 96
SIZE = {"img_size": PATCH * GRID, "patch_size": PATCH, "embed_dim": D, "depth": DEPTH, "num_heads": HEADS}
IMAGES = torch.rand(2, 3, PATCH * GRID, PATCH * GRID, generator=torch.Generator().manual_seed(5))


def filled(shapes: dict[str, tuple[int, ...]]) -> State:
    """Tensors of these shapes with random values; what scales is near 1."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(shape, generator=generator) * 0.2 + float(len(shape) == 1 and "bias" not in name)
        for name, shape in shapes.items()
    }


def pair(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    """A weight and its bias."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def layers(stem: str, parts: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"{stem}.{i}.{name}": shape for i in range(DEPTH) for name, shape in parts.items()}


# ---------------------------------------------------------------------------------------------- formulas


@dataclass
class Formula:
    """What transformers computes with its tensors: embeddings, layers with norms before, and a last norm."""

    state: State
    layer: str  # opens a layer's names
    names: dict[str, str]  # norm1, q, k, v, o, norm2, up, down, scale1, scale2, norm; gate where it has one
    eps: float
    act: Callable[[Tensor], Tensor] = F.gelu
    turn: Callable[[Tensor], Tensor] = lambda x: x  # of queries and keys, by their positions

    def linear(self, x: Tensor, name: str) -> Tensor:
        out = x @ self.state[f"{name}.weight"].T
        return out + self.state[f"{name}.bias"] if f"{name}.bias" in self.state else out

    def norm(self, x: Tensor, name: str) -> Tensor:
        centered = x - x.mean(-1, keepdim=True)
        scaled = centered / (centered.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
        return scaled * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def patches(self, name: str) -> Tensor:
        bias = self.state.get(f"{name}.bias")
        return F.conv2d(IMAGES, self.state[f"{name}.weight"], bias, stride=PATCH).flatten(2).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (HEADS, D // HEADS)).transpose(1, 2) for x in (q, k, v))
        rows = (self.turn(q) @ self.turn(k).transpose(-1, -2) / math.sqrt(D // HEADS)).softmax(-1)
        return (rows @ v).transpose(1, 2).flatten(2)

    def __call__(self, x: Tensor) -> Tensor:
        """Tokens after the last norm."""
        for i in range(DEPTH):
            own = {part: f"{self.layer}.{i}.{name}" for part, name in self.names.items()}
            y = self.norm(x, own["norm1"])
            y = self.linear(self.attend(*(self.linear(y, own[part]) for part in "qkv")), own["o"])
            x = x + y * self.state[f"{own['scale1']}.lambda1"] if "scale1" in own else x + y
            y = self.norm(x, own["norm2"])
            up = self.linear(y, own["up"])
            up = self.act(self.linear(y, own["gate"])) * up if "gate" in own else self.act(up)
            y = self.linear(up, own["down"])
            x = x + y * self.state[f"{own['scale2']}.lambda1"] if "scale2" in own else x + y
        return self.norm(x, self.names["norm"])


def first(state: State, name: str) -> Tensor:
    return state[name].expand(len(IMAGES), -1, -1)


VIT_NAMES = {
    "norm1": "layernorm_before",
    "q": "attention.attention.query",
    "k": "attention.attention.key",
    "v": "attention.attention.value",
    "o": "attention.output.dense",
    "norm2": "layernorm_after",
    "up": "intermediate.dense",
    "down": "output.dense",
}
DINOV2_NAMES = {
    **VIT_NAMES,
    **{"norm1": "norm1", "norm2": "norm2", "up": "mlp.fc1", "down": "mlp.fc2"},
    **{"scale1": "layer_scale1", "scale2": "layer_scale2"},
}
DINOV3_NAMES = {
    **DINOV2_NAMES,
    **{"q": "attention.q_proj", "k": "attention.k_proj", "v": "attention.v_proj", "o": "attention.o_proj"},
    **{"up": "mlp.up_proj", "down": "mlp.down_proj", "norm": "norm"},
}
TOWER_NAMES = {
    "norm1": "layer_norm1",
    **{part: f"self_attn.{part}_proj" for part in "qkv"},
    **{"o": "self_attn.out_proj", "norm2": "layer_norm2", "up": "mlp.fc1", "down": "mlp.fc2"},
}


def of_layers(stem: str, names: dict[str, str]) -> dict[str, tuple[int, ...]]:
    parts: dict[str, tuple[int, ...]] = {}
    for part, name in names.items():
        if part.startswith("norm") and part != "norm":
            parts |= pair(name, D)
        elif part.startswith("scale"):
            parts[f"{name}.lambda1"] = (D,)
        elif part != "norm":
            parts |= pair(name, *{"up": (HIDDEN, D), "gate": (HIDDEN, D), "down": (D, HIDDEN)}.get(part, (D, D)))
    return layers(stem, parts)


def vit(prefix: str, more: dict[str, tuple[int, ...]], tokens: int = 1) -> State:
    return filled(
        {
            f"{prefix}embeddings.cls_token": (1, 1, D),
            f"{prefix}embeddings.mask_token": (1, 1, D),
            f"{prefix}embeddings.position_embeddings": (1, tokens + GRID**2, D),
            **pair(f"{prefix}embeddings.patch_embeddings.projection", D, 3, PATCH, PATCH),
            **of_layers(f"{prefix}encoder.layer", VIT_NAMES),
            **pair(f"{prefix}layernorm", D),
            **pair(f"{prefix}pooler.dense", D, D),
            **more,
        }
    )


def vit_logits(state: State, prefix: str, extra: list[str], heads: list[str]) -> Tensor:
    formula = Formula(state, f"{prefix}encoder.layer", {**VIT_NAMES, "norm": f"{prefix}layernorm"}, 1e-12)
    patches = formula.patches(f"{prefix}embeddings.patch_embeddings.projection")
    tokens = [first(state, f"{prefix}embeddings.{name}") for name in ["cls_token", *extra]]
    out = formula(torch.cat([*tokens, patches], 1) + state[f"{prefix}embeddings.position_embeddings"])
    return sum(formula.linear(out[:, i], head) for i, head in enumerate(heads)) / len(heads)  # type: ignore[return-value]


def loaded(tmp_path: Path, name: str, state: State, **arguments: Any) -> tuple[Any, list[str]]:
    """timm's network with the file's weights, and what was said of their names."""
    lines: list[str] = []
    torch.save(state, tmp_path / "w.pth")
    network = timm.create_model(name, **{**SIZE, **arguments}).eval()
    load_weights(network, WeightsFile(tmp_path / "w.pth"))
    rename_to_fit(network, state, "w.pth", lines.append)
    return network, lines


def close(ours: Tensor, theirs: Tensor) -> bool:
    assert ours.shape == theirs.shape
    assert float(theirs.std()) > 0.05, "it says something"
    return float((ours - theirs).abs().max()) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["vit.", "", "teacher.backbone.vit."])
def test_vit(tmp_path: Path, prefix: str) -> None:
    state = vit(prefix, pair("classifier", 5, D))
    network, lines = loaded(tmp_path, "vit_tiny_patch16_224", state, num_classes=5)
    assert close(network(IMAGES), vit_logits(state, prefix, [], ["classifier"]))
    assert lines == [
        "w.pth: the names of transformers' ViT and DeiT became timm's; 3 other tensors were left out "
        f"({prefix}embeddings.mask_token, {prefix}pooler.dense.weight, {prefix}pooler.dense.bias)"
    ]


@torch.no_grad()
def test_deit_with_both_heads(tmp_path: Path) -> None:
    names = {"deit.embeddings.distillation_token": (1, 1, D)}
    heads = ["cls_classifier", "distillation_classifier"]
    state = vit("deit.", {**names, **pair(heads[0], 5, D), **pair(heads[1], 5, D)}, 2)
    network, _ = loaded(tmp_path, "deit_tiny_distilled_patch16_224", state, num_classes=5)
    assert close(network(IMAGES), vit_logits(state, "deit.", ["distillation_token"], heads))


@torch.no_grad()
@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2(tmp_path: Path, registers: int) -> None:
    prefix = "dinov2_with_registers." if registers else ""
    state = vit(prefix, of_layers(f"{prefix}encoder.layer", DINOV2_NAMES))
    old = tuple(VIT_NAMES[part] for part in ("norm1", "norm2", "up", "down"))
    state = {
        name: tensor
        for name, tensor in state.items()
        if "pooler" not in name and not re.fullmatch(rf".*layer\.\d\.({'|'.join(map(re.escape, old))})\.\w+", name)
    }
    if registers:
        state[f"{prefix}embeddings.register_tokens"] = torch.randn(1, registers, D)
    name = "vit_small_patch14_reg4_dinov2" if registers else "vit_small_patch14_dinov2"
    network, lines = loaded(tmp_path, name, state, num_classes=0)
    formula = Formula(state, f"{prefix}encoder.layer", {**DINOV2_NAMES, "norm": f"{prefix}layernorm"}, 1e-6)
    x = torch.cat(
        [
            first(state, f"{prefix}embeddings.cls_token"),
            formula.patches(f"{prefix}embeddings.patch_embeddings.projection"),
        ],
        1,
    )
    x = x + state[f"{prefix}embeddings.position_embeddings"]
    if registers:
        x = torch.cat([x[:, :1], first(state, f"{prefix}embeddings.register_tokens"), x[:, 1:]], 1)
    assert close(network.forward_features(IMAGES), formula(x))
    assert "transformers' DINOv2 became timm's; 1 other tensor was left out" in lines[0]


@torch.no_grad()
def test_dinov2_with_a_gate(tmp_path: Path) -> None:
    names = {**DINOV2_NAMES, "up": "mlp.weights_in", "down": "mlp.weights_out", "norm": "layernorm"}
    state = {n: t for n, t in vit("", of_layers("encoder.layer", names)).items() if "pooler" not in n}
    old = tuple(f".{VIT_NAMES[part]}." for part in ("norm1", "norm2", "up"))
    state = {n: t for n, t in state.items() if not any(o in n for o in old) and not re.search(r"\d\.output\.dense", n)}
    state = {n: t[:, : HIDDEN // 2] if "weights_out.weight" in n else t for n, t in state.items()}
    network, _ = loaded(tmp_path, "vit_giant_patch14_dinov2", state, num_classes=0, mlp_ratio=HIDDEN / D)

    def gated(x: Tensor) -> Tensor:
        one, two = x.chunk(2, -1)
        return F.silu(one) * two

    formula = Formula(state, "encoder.layer", names, 1e-6, gated)
    x = torch.cat([first(state, "embeddings.cls_token"), formula.patches("embeddings.patch_embeddings.projection")], 1)
    assert close(network.forward_features(IMAGES), formula(x + state["embeddings.position_embeddings"]))


def turned(x: Tensor) -> Tensor:
    """DINOv3's rotation of the patches' queries or keys `[B, heads, T, d]`, by coordinates from -1 to 1."""
    size = D // HEADS
    places = (torch.arange(GRID) + 0.5) / GRID * 2 - 1
    yx = torch.cartesian_prod(places, places)  # [T, 2]
    periods = 100.0 ** (torch.arange(size // 4) * 4 / size)
    angles = (2 * math.pi * yx[:, :, None] / periods).flatten(1).tile(2)
    front, patches = x[..., : -(GRID**2), :], x[..., -(GRID**2) :, :]
    one, two = patches.chunk(2, -1)
    return torch.cat([front, patches * angles.cos() + torch.cat([-two, one], -1) * angles.sin()], -2)


def dinov3(names: dict[str, str]) -> State:
    state = filled(
        {
            "embeddings.cls_token": (1, 1, D),
            "embeddings.mask_token": (1, 1, D),
            "embeddings.register_tokens": (1, 4, D),
            **pair("embeddings.patch_embeddings", D, 3, PATCH, PATCH),
            **of_layers("layer", names),
            **pair("norm", D),
        }
    )
    return {name: tensor for name, tensor in state.items() if not name.endswith("k_proj.bias")}


def dinov3_tokens(state: State, names: dict[str, str], act: Callable[[Tensor], Tensor]) -> Tensor:
    formula = Formula(state, "layer", names, 1e-5, act, turned)
    tokens = [first(state, f"embeddings.{name}") for name in ("cls_token", "register_tokens")]
    return formula(torch.cat([*tokens, formula.patches("embeddings.patch_embeddings")], 1))


@torch.no_grad()
def test_dinov3_with_and_without_biases(tmp_path: Path) -> None:
    arguments = {name: value for name, value in SIZE.items() if name != "num_heads"}
    state = dinov3(DINOV3_NAMES)
    theirs = dinov3_tokens(state, DINOV3_NAMES, F.gelu)
    network, lines = loaded(tmp_path, "vit_small_patch16_dinov3_qkvb", state, **arguments, num_classes=0)
    assert close(network.forward_features(IMAGES), theirs)
    assert "transformers' DINOv3 ViT became timm's; 1 other tensor was left out" in lines[0]
    with pytest.raises(UserError, match=r"does not fit .*unexpected \(blocks\.0\.attn\.qkv\.bias"):
        loaded(tmp_path, "vit_small_patch16_dinov3", state, **arguments, num_classes=0)
    zero = {name: t * 0 if re.search(r"[qv]_proj\.bias", name) else t for name, t in state.items()}
    network, _ = loaded(tmp_path, "vit_small_patch16_dinov3", zero, **arguments, num_classes=0)
    assert close(network.forward_features(IMAGES), dinov3_tokens(zero, DINOV3_NAMES, F.gelu))


@torch.no_grad()
def test_gated_dinov3(tmp_path: Path) -> None:
    names = {**DINOV3_NAMES, "gate": "mlp.gate_proj"}
    state = {n: t * 0 if re.search(r"[qv]_proj\.bias", n) else t for n, t in dinov3(names).items()}
    network, _ = loaded(tmp_path, "vit_small_plus_patch16_dinov3", state, num_classes=0, mlp_ratio=HIDDEN / D)
    assert close(network.forward_features(IMAGES), dinov3_tokens(state, names, F.silu))


def tower(prefix: str, positions: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}embeddings.patch_embedding.weight": (D, 3, PATCH, PATCH),
        f"{prefix}embeddings.position_embedding.weight": (positions, D),
        **of_layers(f"{prefix}encoder.layers", TOWER_NAMES),
        **pair(f"{prefix}post_layernorm", D),
        "text_model.encoder.layers.0.self_attn.q_proj.weight": (D, D),
        "text_model.embeddings.position_embedding.weight": (7, D),
    }


@torch.no_grad()
def test_clip_with_its_projection(tmp_path: Path) -> None:
    shapes = {
        **tower("vision_model.", GRID**2 + 1),
        "vision_model.embeddings.class_embedding": (D,),
        **pair("vision_model.pre_layrnorm", D),
        "visual_projection.weight": (5, D),
    }
    state = {**filled(shapes), "vision_model.embeddings.position_ids": torch.arange(GRID**2 + 1)[None]}
    state["logit_scale"] = torch.tensor(4.0)
    network, lines = loaded(tmp_path, "vit_base_patch16_clip_quickgelu_224", state, num_classes=5)
    names = {**TOWER_NAMES, "norm": "vision_model.post_layernorm"}
    formula = Formula(state, "vision_model.encoder.layers", names, 1e-5, lambda x: x * (1.702 * x).sigmoid())
    token = state["vision_model.embeddings.class_embedding"].expand(len(IMAGES), 1, D)
    x = torch.cat([token, formula.patches("vision_model.embeddings.patch_embedding")], 1)
    x = formula.norm(x + state["vision_model.embeddings.position_embedding.weight"], "vision_model.pre_layrnorm")
    assert close(network(IMAGES), formula(x)[:, 0] @ state["visual_projection.weight"].T)
    assert "transformers' CLIP vision tower became timm's; 4 other tensors were left out" in lines[0]


@torch.no_grad()
def test_siglip_with_its_pooling(tmp_path: Path) -> None:
    shapes = {
        **tower("vision_model.", GRID**2),
        "vision_model.embeddings.patch_embedding.bias": (D,),
        "vision_model.head.probe": (1, 1, D),
        "vision_model.head.attention.in_proj_weight": (3 * D, D),
        "vision_model.head.attention.in_proj_bias": (3 * D,),
        **pair("vision_model.head.attention.out_proj", D, D),
        **pair("vision_model.head.layernorm", D),
        **pair("vision_model.head.mlp.fc1", HIDDEN, D),
        **pair("vision_model.head.mlp.fc2", D, HIDDEN),
    }
    state = filled(shapes)
    changes = {"num_classes": 0, "act_layer": "gelu_tanh"}  # transformers' approximation, which timm's names leave out
    network, lines = loaded(tmp_path, "vit_base_patch16_siglip_224", state, **changes)
    names = {**TOWER_NAMES, "norm": "vision_model.post_layernorm"}
    act = torch.nn.GELU("tanh")
    formula = Formula(state, "vision_model.encoder.layers", names, 1e-6, act)
    x = formula.patches("vision_model.embeddings.patch_embedding")
    x = formula(x + state["vision_model.embeddings.position_embedding.weight"])
    head = "vision_model.head"
    weights = state[f"{head}.attention.in_proj_weight"].chunk(3)
    biases = state[f"{head}.attention.in_proj_bias"].chunk(3)
    given = (first(state, f"{head}.probe"), x, x)
    q, k, v = (one @ w.T + b for one, w, b in zip(given, weights, biases, strict=True))
    x = formula.linear(formula.attend(q, k, v), f"{head}.attention.out_proj")
    y = formula.linear(act(formula.linear(formula.norm(x, f"{head}.layernorm"), f"{head}.mlp.fc1")), f"{head}.mlp.fc2")
    assert close(network(IMAGES), (x + y)[:, 0])
    assert "transformers' SigLIP vision tower became timm's; 2 other tensors were left out" in lines[0]


@torch.no_grad()
def test_position_embeddings_of_another_grid_are_resampled_as_timm_does(tmp_path: Path) -> None:
    state = vit("vit.", pair("classifier", 5, D))
    network, _ = loaded(tmp_path, "vit_tiny_patch16_224", state, num_classes=5, img_size=48)
    first_fit, _ = loaded(tmp_path, "vit_tiny_patch16_224", state, num_classes=5)
    wider = timm.create_model("vit_tiny_patch16_224", **{**SIZE, "img_size": 48}, num_classes=5)
    renamed = timm.models.vision_transformer.checkpoint_filter_fn(dict(first_fit.state_dict()), wider)
    assert torch.equal(network.pos_embed, renamed["pos_embed"])


def test_what_does_not_fit_is_refused_with_names(tmp_path: Path) -> None:
    state = vit("vit.", pair("classifier", 5, D))
    with pytest.raises(UserError, match=r"12 missing \(blocks\.2\.norm1\.weight, "):
        loaded(tmp_path, "vit_tiny_patch16_224", state, num_classes=5, depth=3)
    with pytest.raises(UserError, match=r"unexpected \(blocks\.1\.norm1\.weight, |unexpected \(blocks\.1\."):
        loaded(tmp_path, "vit_tiny_patch16_224", state, num_classes=5, depth=1)
    with pytest.raises(UserError, match="Its classifier has 5 classes: `teacher_arg=num_classes=5`"):
        loaded(tmp_path, "vit_tiny_patch16_224", state, num_classes=3)
    both = {f"{one}.{name}": tensor for one in ("a", "b") for name, tensor in vit("", {}).items()}
    with pytest.raises(UserError, match=r"prefixes 'a\.' and 'b\.', which fit equally well\n  .*`weights_key=a` or"):
        loaded(tmp_path, "vit_tiny_patch16_224", both, num_classes=0)
    torn = {**state, "vit.encoder.layer.0.attention.attention.key.weight": torch.zeros(D, D + 1)}
    with pytest.raises(UserError, match="its names are those of transformers' ViT and DeiT, but not its shapes"):
        loaded(tmp_path, "vit_tiny_patch16_224", torn, num_classes=5)
