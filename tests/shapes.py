"""A type checker that looks at shapes alone: jaxtyping's array types are held against the tensors of each call.

`tests/conftest.py` puts it around the functions of losses and alignment. Other annotations are left to mypy: tests pass
stand-ins where only a shape matters.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterable
from typing import Any, Union, get_args, get_origin

import jaxtyping


def check_shapes(function: Any) -> Any:
    """The function, with a TypeError for a tensor that is not of the shape or type that the signature states."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            if not _is_of(value, signature.parameters[name].annotation):
                raise TypeError(name)
        return function(*args, **kwargs)

    return checked


def _is_of(value: Any, annotation: Any) -> bool:
    """Whether all tensors in a value are what the annotation says; anything else passes."""
    if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
        return not hasattr(value, "dtype") or isinstance(value, annotation)
    origin, arguments = get_origin(annotation), [one for one in get_args(annotation) if one is not Ellipsis]
    if origin in (Union, types.UnionType):
        return any(_is_of(value, one) for one in arguments if not (one is type(None) and value is not None))
    if isinstance(value, list | tuple) and isinstance(origin, type) and issubclass(origin, Iterable):
        each = arguments * len(value) if len(arguments) == 1 else arguments
        return len(each) == len(value) and all(map(_is_of, value, each))
    return True
