"""Small networks of timm, and what they attend with.

A network is `Any` to the type checker: its parts are found by name, and to `nn.Module` each is a tensor or a module.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn

from precompute.taps import attention_layers

SMALL: dict[str, Any] = {"img_size": 32, "depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
HALF = (0.5, 0.5, 0.5)


def make(name: str, **arguments: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, **arguments).eval()


def small_vit(**changes: Any) -> Any:
    """A plain ViT with attention that is far from uniform."""
    return sharpened(make("vit_tiny_patch16_224", **{**SMALL, "patch_size": 8, **changes}))


def sharpened(model: Any) -> Any:
    with torch.no_grad():
        if model.cls_token is not None:
            model.cls_token.normal_()
        for block in model.blocks:
            block.attn.qkv.weight.mul_(4)
    return model


def images(size: int = 32, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def channels(module: Any) -> int:
    return int(getattr(module, "num_features", None) or module.num_channels)


def with_hooks(model: torch.nn.Module) -> list[str]:
    """Names of the modules that have hooks. PyTorch lists hooks in no public way."""
    return [name for name, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks]  # noqa: SLF001


def seen_attention(model: nn.Module, batch: torch.Tensor) -> list[torch.Tensor]:
    """The attention matrices `[B, H, N, N]` that go into the dropout of each layer's unfused kernel."""
    seen: list[torch.Tensor] = []
    handles = []
    layers: list[Any] = attention_layers(model)
    for layer in layers:
        layer.fused_attn = False
        handles.append(layer.attn_drop.register_forward_pre_hook(lambda module, args: seen.append(args[0])))
    with torch.no_grad():
        model(batch)
    for handle in handles:
        handle.remove()
    return seen
