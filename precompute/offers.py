"""What a network could give, without its weights: taps, shapes and bytes, as `pipeline teachers NAME` shows them."""

from __future__ import annotations

import math
from typing import Any

import timm
import torch
from torch import nn

from precompute.taps import TAPS, attention_layers, cnn_stages, prefix_roles, takes_image_size
from precompute.targets import default_codec
from precompute.teachers import about_weights, resolve
from storage.codecs import Codec
from storage.errors import UserError, first_line


def offers_of(name: str, input_size: int | None = None, grid: int = 14) -> dict[str, Any]:
    """Sizes of a teacher by its short name or any timm name, and what each tap would take.

    Args:
        name: as `--teacher` takes it.
        input_size: of its square input; by default that of its weights.
        grid: side of a CNN's activation maps.

    Returns:
        `model`, `input_size`, `mean`, `std`, `parameters`, `network` (`cnn`, `vit`, `other`), `layers`, and `taps`:
        tap -> `shape` of one sample, default `codec`, `bytes` a view image.

    Raises:
        UserError: an unknown name, or a size that the network does not take.
    """
    model, size, network = bare(name, input_size)
    about = about_weights(model, name)
    shapes, kind, layers = _shapes(network, size, grid)
    taps = {}
    for tap, shape in shapes.items():
        tapped = TAPS[tap]
        codec = Codec(default_codec(tap), shape, tapped.maps, tapped.axes, tapped.values)
        taps[tap] = {"shape": list(shape), "codec": codec.name, "bytes": codec.sample_bytes}
    return {
        "teacher": name, "model": model, "input_size": size, "mean": list(about["mean"]), "std": list(about["std"]),
        "parameters": sum(p.numel() for p in network.parameters()), "network": kind, "layers": layers, "taps": taps,
    }  # fmt: skip


def bare(name: str, input_size: int | None = None, device: str = "meta") -> tuple[str, int, nn.Module]:
    """timm's name, input size and network of a teacher, without its weights.

    Args:
        name: as `--teacher` takes it.
        input_size: of its square input; by default that of its weights.
        device: where its parameters are; on `meta` they take no memory and no time.

    Raises:
        UserError: an unknown name, or a size that the network does not take.
    """
    model, own = resolve(name)
    size = input_size or own or about_weights(model, name)["size"] or 224
    arguments = {"img_size": size} if takes_image_size(model) else {}
    try:
        with torch.device(device):
            network: nn.Module = timm.create_model(model, pretrained=False, **arguments)
    except Exception as error:  # timm raises many kinds
        raise UserError(f"teacher {name} with an input of {size}: cannot be made: {first_line(error)}") from None
    return model, size, network.eval()


def _shapes(network: nn.Module, size: int, grid: int) -> tuple[dict[str, tuple[int, ...]], str, int]:
    """Tap -> shape of one sample, the kind of network, and its layers."""
    width, classes = int(getattr(network, "head_hidden_size", 0)), int(getattr(network, "num_classes", 0))
    ends: dict[str, tuple[int, ...]] = {"embedding": (width,)} if width else {}
    ends |= {"logits": (classes,)} if classes else {}
    try:
        channels = [_channels(module) for _, module in cnn_stages(network)]
        return {"activations": (sum(channels), grid, grid), **ends}, "cnn", len(channels)
    except UserError:
        pass
    try:
        blocks = attention_layers(network)
    except UserError:
        return ends, "other", 0
    prefix = prefix_roles(network)
    embed: Any = getattr(network, "patch_embed", None) or network.embeds  # what NaFlex calls it
    patches = math.prod(embed.dynamic_feat_size((size, size)))
    layers, heads, tokens = len(blocks), int(blocks[0].num_heads), len(prefix) + patches  # type: ignore[arg-type]
    dim = int(network.embed_dim)  # type: ignore[arg-type]
    found: dict[str, tuple[int, ...]] = dict.fromkeys(("q", "k", "v"), (layers, heads, tokens, dim // heads))
    found |= {"attention": (layers, heads, tokens, tokens), "tokens": (1, tokens, dim)}
    if "class" in prefix:
        found = {"class_row": (layers, heads, tokens), "class_token": (dim,), **found}
    return {**found, **ends}, "vit", layers


def _channels(norm: nn.Module) -> int:
    return int(norm.num_features if isinstance(norm, nn.BatchNorm2d) else norm.num_channels)  # type: ignore[arg-type]
