"""View images as a network takes them. No torch at import."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def normalize(
    images: Tensor,
    mean: Sequence[float] | Tensor,
    std: Sequence[float] | Tensor,
    resize: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Normalized images f32 `[B, 3, S, S]` from uint8 `[B, S, S, 3]`: (pixels / 255 − mean) / std.

    Args:
        images: the view images.
        mean: of pixels from 0 to 1, three channels; a tensor is `[3, 1, 1]`.
        std: as `mean`.
        resize: applied before, to `[B, 3, S, S]` from 0 to 1.
    """
    x = images.permute(0, 3, 1, 2).float() / 255
    if resize is not None:
        x = resize(x)
    center, scale = (x.new_tensor(v).view(3, 1, 1) if isinstance(v, Sequence) else v for v in (mean, std))
    return (x - center) / scale
