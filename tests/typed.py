"""What a test knows of a value and its type does not say."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


def present(value: T | None) -> T:
    """The value, which is not None."""
    assert value is not None
    return value


def grad(tensor: torch.Tensor) -> torch.Tensor:
    """The gradient that a backward pass left in a tensor."""
    assert tensor.grad is not None
    return tensor.grad
