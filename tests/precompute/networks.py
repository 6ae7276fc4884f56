"""Small networks of timm, and what they attend with.

A network is `Any` to the type checker: its parts are found by name, and to `nn.Module` each is a tensor or a module.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn

SMALL: dict[str, Any] = {"img_size": 32, "depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
HALF = (0.5, 0.5, 0.5)


def make(name: str, **arguments: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, **arguments).eval()


def small_vit(**changes: Any) -> Any:
    """A plain ViT with attention that is far from uniform."""
    return sharpened(make("vit_tiny_patch16_224", **{**SMALL, "patch_size": 8, **changes}))


def sharpened(model: Any) -> Any:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("cls_token", "relative_position_bias_table")):
                parameter.normal_(generator=generator)
            elif name.endswith(("rel_pos_h", "rel_pos_w")):  # multiplied with queries
                parameter.normal_(0, 0.05, generator=generator)
            elif name.endswith(("qkv.weight", "q_proj.weight", "k_proj.weight", ".q.weight", ".k.weight")):
                parameter.mul_(4)
    return model


def images(size: int = 32, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def channels(module: Any) -> int:
    return int(getattr(module, "num_features", None) or module.num_channels)


def with_hooks(model: torch.nn.Module) -> list[str]:
    """Names of the modules that have hooks. PyTorch lists hooks in no public way."""
    return [name for name, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks]  # noqa: SLF001


def attention_modules(model: nn.Module) -> list[Any]:
    """Modules of timm's attention layers, by their names: `attn`, with a dropout of their rows."""
    return [module for module in model.modules() if hasattr(module, "attn_drop") and hasattr(module, "num_heads")]


def seen_attention(model: nn.Module, batch: torch.Tensor) -> list[torch.Tensor]:
    """The rows `[B, H, Q, N]` that go into the dropout of each layer's unfused kernel, read by hooks."""
    seen: list[torch.Tensor] = []
    layers = attention_modules(model)
    fused = [getattr(layer, "fused_attn", None) for layer in layers]
    handles = [
        layer.attn_drop.register_forward_pre_hook(lambda _module, args: seen.append(args[0])) for layer in layers
    ]
    for layer in layers:
        layer.fused_attn = False
    with torch.no_grad():
        model(batch)
    for layer, handle, was in zip(layers, handles, fused, strict=True):
        layer.fused_attn = was
        handle.remove()
    return seen
