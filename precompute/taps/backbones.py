"""The one place that imports timm.

Where torch has no CUDA, the registry's torchvision may be built against another torch and fail to import for two
missing operators. Declaring them is enough, nothing here calls them.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch


def _declare_torchvision_operators() -> Any:
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for operator in ("nms", "qnms"):
        with suppress(RuntimeError):  # a matching torchvision has declared them already
            library.define(  # type: ignore[no-untyped-call]
                f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
    return library


if not torch.version.cuda:
    _library = _declare_torchvision_operators()  # undeclared again when it is collected

import timm  # noqa: E402

__all__ = ["takes_image_size", "timm"]


def takes_image_size(model: str) -> bool:
    """Whether a timm model is made for one image size, so that `create_model` takes `img_size`."""
    config = timm.get_pretrained_cfg(model.partition(".")[0])
    return config is not None and bool(config.fixed_input_size)
