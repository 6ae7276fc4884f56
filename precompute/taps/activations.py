"""Activation maps: where each stage of a network is read, and how its maps come onto a grid."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Float32
from torch import Tensor, nn
from torch.nn import functional as F

from precompute.taps.probe import once_per_network, run_blank
from storage.errors import UserError

At = Literal["norm", "block", "stage"]
POSITIONS: tuple[At, ...] = ("norm", "block", "stage")


def cnn_stages(model: nn.Module, at: At = "norm") -> list[tuple[str, nn.Module]]:
    """(name, module) of what each stage's maps are read after.

    EfficientNet-B3 has seven stages with 24, 32, 48, 96, 136, 232 and 384 maps, ResNet-34 four.

    Args:
        model: a CNN.
        at: `norm`, the last normalization in the stage's last block, before the residual sum; or `block`, that block
            itself, after the sum and the activation function that may follow it.

    Raises:
        UserError: the network has no stages that are known here, or a stage without a normalization over maps.
    """
    names = {module: name for name, module in model.named_modules()}
    stages: list[tuple[str, nn.Module]] = []
    for stage in _stages(model):
        blocks = getattr(stage, "blocks", stage)
        last = list(blocks.children())[-1]
        norms = [m for m in _without_shortcuts(last) if isinstance(m, nn.BatchNorm2d | nn.GroupNorm)]
        if not norms:
            raise UserError(
                f"{type(model).__name__}: stage {names[stage]} has no batch or group normalization to read maps after"
            )
        stages.append((names[norms[-1]], norms[-1]) if at == "norm" else (names[last], last))
    return stages


@once_per_network
def stage_maps(model: nn.Module, size: int) -> tuple[tuple[int, int], ...]:
    """(channels, side) of the square maps that timm's `forward_intermediates` gives, one a stage or block.

    Empty for a network that has no such method, or whose maps are not square.

    Args:
        model: any network; it runs once (`run_blank`).
        size: side of its input.
    """
    if not hasattr(model, "forward_intermediates"):
        return ()
    try:
        maps = run_blank(model, size, "forward_intermediates", output_fmt="NCHW", intermediates_only=True)
    except (TypeError, AssertionError, NotImplementedError):  # of networks that have only a part of it
        return ()
    if any(m.ndim != 4 or m.shape[-1] != m.shape[-2] for m in maps):
        return ()
    return tuple((m.shape[1], m.shape[-1]) for m in maps)


def _stages(model: nn.Module) -> list[nn.Module]:
    blocks = getattr(model, "blocks", None)
    if isinstance(blocks, nn.Sequential) and all(isinstance(stage, nn.Sequential) for stage in blocks):
        return list(blocks)  # EfficientNet, MobileNet
    for names in (("layer1", "layer2", "layer3", "layer4"), ("s1", "s2", "s3", "s4")):  # ResNet, RegNet
        if all(hasattr(model, name) for name in names):
            return [getattr(model, name) for name in names]
    if isinstance(stages := getattr(model, "stages", None), nn.Sequential):
        return list(stages)
    raise UserError(
        f"{type(model).__name__}: it has no convolutional stages that are known here; activations need a CNN"
    )


def _without_shortcuts(block: nn.Module) -> Iterator[nn.Module]:
    yield block
    for name, child in block.named_children():
        if name not in ("downsample", "shortcut"):
            yield from _without_shortcuts(child)


@functools.lru_cache(maxsize=64)
def resize_matrix(size_in: int, size_out: int, antialias: bool = False) -> Float32[Tensor, "size_out size_in"]:
    """Bicubic resizing of one axis as a matrix, with the weights of `F.interpolate`.

    Two products with it are a hundred times faster in ONNX Runtime than its Resize.

    Args:
        size_in: of the axis before.
        size_out: of the axis after.
        antialias: as in `F.interpolate`: the kernel widens where the axis shrinks, and is Pillow's (a = −0.5, not
            −0.75) whether it shrinks or grows.
    """
    # Along the rows of a whole image: with an image of one column, torch's antialiasing gives other weights.
    identity = torch.eye(size_in, dtype=torch.float64)[None, None]
    rows = F.interpolate(identity, (size_in, size_out), mode="bicubic", align_corners=False, antialias=antialias)
    return rows[0, 0].T.contiguous().float()
