"""What timm says of its models before they are made."""

from __future__ import annotations

import timm


def takes_image_size(model: str) -> bool:
    """Whether a timm model is made for one image size, so that `create_model` takes `img_size`."""
    config = timm.get_pretrained_cfg(model.partition(".")[0])
    return config is not None and bool(config.fixed_input_size)
