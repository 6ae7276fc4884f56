"""Shifted patch tokenization: each patch is seen together with four diagonally shifted views of its image.

Lee et al., "Vision Transformer for Small-Size Datasets", section 3.1. A student with it is timm's network but for the
projection of its patches, so its state dict fits no bare timm model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from storage.errors import UserError, setting
from student.settings import WITH_CLASS

VIEWS = 5  # the image and its four shifts


class ShiftedPatches(nn.Module):
    """Patches of an image and of its four shifts by half a patch, normed and projected: in place of a convolution.

    What is shifted in from outside is zero. A patch's 5·C·p·p values go through a LayerNorm and a linear map.

    Args:
        channels: C of the image.
        patch: p, the side of a patch, at least 2.
        width: D of the tokens.
    """

    def __init__(self, channels: int, patch: int, width: int) -> None:
        super().__init__()
        self.patch, values = patch, VIEWS * channels * patch * patch
        self.norm, self.linear = nn.LayerNorm(values), nn.Linear(values, width)

    def forward(self, images: Tensor) -> Tensor:
        """Tokens `[B, D, H/p, W/p]` of images `[B, C, H, W]`."""
        by_patch = F.pixel_unshuffle(shifted(images, self.patch // 2), self.patch).permute(0, 2, 3, 1)
        tokens: Tensor = self.linear(self.norm(by_patch))
        return tokens.permute(0, 3, 1, 2)


def shifted(images: Tensor, by: int) -> Tensor:
    """An image, and it moved right and down, left and down, right and up, left and up; `[B, 5·C, H, W]`.

    Args:
        images: `[B, C, H, W]`.
        by: pixels in each direction.
    """
    height, width = images.shape[-2:]
    wide = F.pad(images, (by, by, by, by))
    moves = [wide[..., y : y + height, x : x + width] for y in (0, 2 * by) for x in (0, 2 * by)]
    return torch.cat([images, *moves], 1)


def shift_patches(model: nn.Module) -> None:
    """Give a new network shifted patches; the rest of it stays as it is.

    Raises:
        UserError: it does not cut images into square patches of two pixels or more by one convolution.
    """
    embed = getattr(model, "patch_embed", None)
    old = getattr(embed, "proj", None)
    side = old.kernel_size[0] if isinstance(old, nn.Conv2d) else 0
    if not isinstance(old, nn.Conv2d) or side < 2 or not old.kernel_size == old.stride == (side, side):
        raise UserError(
            f"student.shifted_patches: {type(model).__name__} does not cut images into square patches of two pixels or "
            "more",
            hint=f"Take a plain ViT, such as {setting('student.model', WITH_CLASS)}",
        )
    embed.proj = ShiftedPatches(old.in_channels, side, old.out_channels)  # type: ignore[union-attr]
