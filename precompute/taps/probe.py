"""Looking at what a network has by running it once on images without content."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn

IMAGES = 2  # in such a pass

F = TypeVar("F", bound=Callable[..., Any])


def image_size(model: nn.Module) -> int:
    """Side of the images that a network was made for."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is None:
        size = (getattr(model, "default_cfg", None) or {}).get("input_size", (3, 224, 224))[1:]
    return int(size[0]) if isinstance(size, tuple | list) else int(size)


def run_blank(model: nn.Module, size: int, method: str = "forward", **arguments: Any) -> Any:
    """What a network gives of two images without content, in eval mode; on the meta device it takes no time.

    Args:
        model: any network; its mode stays as it is.
        size: side of its input.
        method: that is called.
        arguments: of the method, after the images.
    """
    parameter, training = next(model.parameters()), model.training
    images = torch.zeros(IMAGES, 3, size, size, device=parameter.device, dtype=parameter.dtype)
    model.eval()
    try:
        with torch.no_grad():
            run = model if method == "forward" else getattr(model, method)  # hooks hear of calls alone
            return run(images, **arguments)
    finally:
        model.train(training)


def once_per_network(look: F) -> F:
    """The function, whose first argument is a network, looking at each only once for the same other arguments."""
    known: WeakKeyDictionary[nn.Module, dict[Any, Any]] = WeakKeyDictionary()

    @functools.wraps(look)
    def answer(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        answers = known.setdefault(model, {})
        if (key := (args, *sorted(kwargs.items()))) not in answers:
            answers[key] = look(model, *args, **kwargs)
        return answers[key]

    return cast("F", answer)
