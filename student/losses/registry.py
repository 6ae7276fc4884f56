"""The losses by the name that recipes use."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from types import ModuleType

import student.losses


@functools.cache
def methods() -> dict[str, ModuleType]:
    """Name of a method, as recipes say it -> its module."""
    found_modules = pkgutil.iter_modules(student.losses.__path__)
    modules = [importlib.import_module(f"student.losses.{found.name}") for found in found_modules]
    return {module.Settings.model_fields["type"].default: module for module in modules if hasattr(module, "Settings")}
