"""Names of Hugging Face transformers' vision networks, and timm's for the same tensors: one table a family."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from storage.errors import UserError, first_line
from storage.objects.checkpoint_file import several_fit

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Family:
    """Networks of transformers that share their names.

    Attributes:
        name: what messages call them.
        marker: ends one name of each of their files, and of no other family's.
        names: patterns of names behind the prefix that the marker has -> timm's name; of both, the ending `.weight` or
            `.bias` is left away where it is the same. `N` is a layer's number.
        outside: the same for names without the prefix: a classifier.
        unused: patterns of names that timm's networks do not have.
    """

    name: str
    marker: str
    names: Mapping[str, str]
    outside: Mapping[str, str]
    unused: tuple[str, ...] = ()


class Renamed(NamedTuple):
    """A state dict with timm's names: the family's name, name -> tensor, and the names that were left out."""

    family: str
    state: dict[str, Tensor]
    left_out: list[str]


_EMBEDDINGS = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
}
_ATTENTION = {
    **{f"encoder.layer.N.attention.attention.{part}": f"blocks.N.attn.{part[0]}" for part in ("query", "key", "value")},
    "encoder.layer.N.attention.output.dense": "blocks.N.attn.proj",
    "layernorm": "norm",
}
_DINOV3 = {
    "embeddings.cls_token": "cls_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.patch_embeddings": "patch_embed.proj",
    "layer.N.norm1": "blocks.N.norm1",
    "layer.N.norm2": "blocks.N.norm2",
    **{f"layer.N.attention.{part}_proj": f"blocks.N.attn.{part}" for part in "qkv"},
    "layer.N.attention.o_proj": "blocks.N.attn.proj",
    "layer.N.layer_scale1.lambda1": "blocks.N.gamma_1",
    "layer.N.layer_scale2.lambda1": "blocks.N.gamma_2",
    "norm": "norm",
}
_TOWER = {
    "embeddings.patch_embedding": "patch_embed.proj",
    "embeddings.position_embedding.weight": "pos_embed",
    **{f"encoder.layers.N.self_attn.{part}_proj": f"blocks.N.attn.{part}" for part in "qkv"},
    "encoder.layers.N.self_attn.out_proj": "blocks.N.attn.proj",
    "encoder.layers.N.layer_norm1": "blocks.N.norm1",
    "encoder.layers.N.layer_norm2": "blocks.N.norm2",
    "encoder.layers.N.mlp.fc1": "blocks.N.mlp.fc1",
    "encoder.layers.N.mlp.fc2": "blocks.N.mlp.fc2",
    "post_layernorm": "norm",
}

FAMILIES = (
    Family(
        "ViT and DeiT",
        "encoder.layer.0.layernorm_before.weight",
        {
            **_EMBEDDINGS,
            "embeddings.distillation_token": "dist_token",
            **_ATTENTION,
            "encoder.layer.N.layernorm_before": "blocks.N.norm1",
            "encoder.layer.N.layernorm_after": "blocks.N.norm2",
            "encoder.layer.N.intermediate.dense": "blocks.N.mlp.fc1",
            "encoder.layer.N.output.dense": "blocks.N.mlp.fc2",
        },
        {"classifier": "head", "cls_classifier": "head", "distillation_classifier": "head_dist"},
        ("embeddings.mask_token", "pooler.dense"),
    ),
    Family(
        "DINOv2",
        "encoder.layer.0.layer_scale1.lambda1",
        {
            **_EMBEDDINGS,
            "embeddings.register_tokens": "reg_token",
            **_ATTENTION,
            "encoder.layer.N.norm1": "blocks.N.norm1",
            "encoder.layer.N.norm2": "blocks.N.norm2",
            "encoder.layer.N.layer_scale1.lambda1": "blocks.N.ls1.gamma",
            "encoder.layer.N.layer_scale2.lambda1": "blocks.N.ls2.gamma",
            "encoder.layer.N.mlp.fc1": "blocks.N.mlp.fc1",
            "encoder.layer.N.mlp.fc2": "blocks.N.mlp.fc2",
            "encoder.layer.N.mlp.weights_in": "blocks.N.mlp.fc1",
            "encoder.layer.N.mlp.weights_out": "blocks.N.mlp.fc2",
        },
        {},
        ("embeddings.mask_token",),
    ),
    Family(
        "DINOv3 ViT (gated)",
        "layer.0.mlp.gate_proj.weight",
        {
            **_DINOV3,
            "layer.N.mlp.gate_proj": "blocks.N.mlp.fc1_g",
            "layer.N.mlp.up_proj": "blocks.N.mlp.fc1_x",
            "layer.N.mlp.down_proj": "blocks.N.mlp.fc2",
        },
        {},
        ("embeddings.mask_token", "rope_embeddings.inv_freq"),
    ),
    Family(
        "DINOv3 ViT",
        "layer.0.mlp.up_proj.weight",
        {**_DINOV3, "layer.N.mlp.up_proj": "blocks.N.mlp.fc1", "layer.N.mlp.down_proj": "blocks.N.mlp.fc2"},
        {},
        ("embeddings.mask_token", "rope_embeddings.inv_freq"),
    ),
    Family(
        "CLIP vision tower",
        "embeddings.class_embedding",
        {"embeddings.class_embedding": "cls_token", "pre_layrnorm": "norm_pre", **_TOWER},
        {"visual_projection": "head"},
        ("embeddings.position_ids",),
    ),
    Family(
        "SigLIP vision tower",
        "head.probe",
        {
            **_TOWER,
            "head.probe": "attn_pool.latent",
            "head.attention.in_proj_weight": "attn_pool.in_proj.weight",
            "head.attention.in_proj_bias": "attn_pool.in_proj.bias",
            "head.attention.out_proj": "attn_pool.proj",
            "head.layernorm": "attn_pool.norm",
            "head.mlp.fc1": "attn_pool.mlp.fc1",
            "head.mlp.fc2": "attn_pool.mlp.fc2",
        },
        {},
        ("embeddings.position_ids",),
    ),
)


def from_transformers(model: nn.Module, state: Mapping[str, Tensor], where: str) -> Renamed | None:
    """A state dict with transformers' names under timm's; None where the names are of no family in the table.

    Queries, keys and values are joined as timm has them. What lies outside the family's prefix and is no classifier,
    such as a text tower, is left out; names behind the prefix that the table lacks stay as they are.

    Args:
        model: the timm network that takes them.
        state: name -> tensor, without wrappers' prefixes.
        where: the file, for errors.

    Raises:
        UserError: there are two such networks in it, or the shapes are not such a network's.
    """
    for family in FAMILIES:
        markers = [name for name in state if name == family.marker or name.endswith(f".{family.marker}")]
        if not markers:
            continue
        prefixes = [name.removesuffix(family.marker) for name in markers]
        if len(prefixes) > 1:
            raise several_fit(prefixes, where)
        try:
            return _renamed(model, state, family, prefixes[0])
        except (RuntimeError, ValueError, KeyError) as error:  # shapes that no such network has
            message = f"{where}: its names are those of transformers' {family.name}, but not its shapes"
            raise UserError(f"{message}: {first_line(error)}") from None
    return None


def _renamed(model: nn.Module, state: Mapping[str, Tensor], family: Family, prefix: str) -> Renamed:
    renamed, left_out = {}, []
    roots = {name.partition(".")[0] for name in (*family.names, *family.unused)}
    for name, tensor in state.items():
        inner = name.removeprefix(prefix)
        is_inside = name.startswith(prefix) and (prefix != "" or name.partition(".")[0] in roots)
        new = (_name(inner, family.names) if is_inside else None) or _name(name, family.outside)
        is_unused = any(inner == one or inner.startswith(f"{one}.") for one in family.unused)
        if new is None and (is_unused or not is_inside):
            left_out.append(name)
        else:
            renamed[new or inner] = tensor
    return Renamed(family.name, _as_timm_has_them(model, renamed), left_out)


def _name(name: str, names: Mapping[str, str]) -> str | None:
    """timm's name of a tensor; None where the table has none."""
    number = re.search(r"\.(\d+)\.", f".{name}")
    general = re.sub(r"(^|\.)\d+\.", r"\1N.", name, count=1)
    stem, _, ending = general.rpartition(".")
    new = names.get(general)
    if new is None and ending in ("weight", "bias") and stem in names:
        new = f"{names[stem]}.{ending}"
    return new.replace("N", number[1]) if new and number else new


def _as_timm_has_them(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under timm's names, joined, split and shaped as timm has them."""
    import torch

    own = model.state_dict()
    joined = dict(_joined(state))
    for name in [name for name in joined if name.startswith("attn_pool.in_proj.")]:
        q, k, v = joined.pop(name).chunk(3)
        kind = name.rpartition(".")[2]
        joined |= {f"attn_pool.q.{kind}": q, f"attn_pool.kv.{kind}": torch.cat([k, v])}
    if "head.weight" in joined and "head.bias" in own:  # a projection of CLIP has none
        joined.setdefault("head.bias", torch.zeros(len(joined["head.weight"])))
    for name in [name for name in joined if name.endswith(".attn.qkv.bias") and name not in own]:
        stem = name.removesuffix("qkv.bias")
        q, k, v = joined[name].chunk(3)
        if f"{stem}q_bias" in own and not k.any():
            joined |= {f"{stem}q_bias": q, f"{stem}v_bias": v}
        if (f"{stem}q_bias" in own and not k.any()) or not joined[name].any():  # DINOv3's are zero in most sizes
            del joined[name]
    if getattr(model, "no_embed_class", False) and "reg_token" in joined and "pos_embed" in joined:
        positions = joined["pos_embed"]  # timm adds the class token's to the token itself
        joined |= {"cls_token": joined["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:]}
    return {
        name: tensor[(None,) * max(0, own[name].ndim - tensor.ndim)] if name in own else tensor
        for name, tensor in joined.items()
    }


def _joined(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors with queries, keys and values in one; a bias that one of them lacks is zero."""
    import torch

    for name, tensor in state.items():
        match = re.fullmatch(r"(.*\.attn\.)([qkv])\.(weight|bias)", name)
        if not match:
            yield name, tensor
            continue
        stem, _, kind = match.groups()
        parts = [state.get(f"{stem}{part}.{kind}") for part in "qkv"]
        present = [part for part in parts if part is not None]
        if present[0] is tensor:
            yield f"{stem}qkv.{kind}", torch.cat([torch.zeros_like(tensor) if p is None else p for p in parts])
