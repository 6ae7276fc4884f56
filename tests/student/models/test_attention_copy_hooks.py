"""Where copied attention can go in: q and k only where nothing acts on them after their norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from storage.errors import UserError
from student.models.attention_copy_hooks import AttentionCopyHooks
from tests.precompute.networks import SMALL, make, small_vit


def rotary() -> Any:
    return make("vit_small_patch16_dinov3", **{**SMALL, "patch_size": 8}, qk_norm=True)


class Changed(nn.Module):
    """A layer that changes k alone, after its norm."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor, **_: Any) -> torch.Tensor:
        layer = self.layer
        q, k, v = layer.qkv(x).reshape(*x.shape[:2], 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = layer.q_norm(q), layer.k_norm(k) * 2
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return layer.proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "layer" else getattr(super().__getattr__("layer"), name)


def k_changed() -> Any:
    model = small_vit()
    model.blocks[1].attn = Changed(model.blocks[1].attn)
    return model


@pytest.mark.parametrize(("network", "layer"), [(rotary, 1), (k_changed, 2)])
def test_q_and_k_are_not_copied_where_they_are_changed_after_their_norms(network: Any, layer: int) -> None:
    with pytest.raises(UserError, match=f"layer {layer} changes q and k after their norms"):
        AttentionCopyHooks("qk", [1], 3).attach(network())


def test_maps_are_copied_whatever_made_them() -> None:
    model = rotary()
    hooks = AttentionCopyHooks("map", [1], 3)
    hooks.attach(model)
    images, count = torch.randn(2, 3, 32, 32), 16 + model.num_prefix_tokens
    with torch.no_grad():
        maps = [torch.rand(2, 1, 3, count, count, generator=torch.Generator().manual_seed(n)) for n in (0, 1)]
        outputs = []
        for rows in maps:
            with hooks.attending({"map": rows.softmax(-1)}):
                outputs.append(model(images))
    assert not torch.equal(*outputs)
    with pytest.raises(UserError, match="attends with its teacher's attention"):
        model(images)
