"""The public names of a package, imported when they are first used (PEP 562): importing the package loads nothing."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

DISTRIBUTION = "teacher-store"


def lazy_names(
    package: str, modules: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The module functions `__getattr__` and `__dir__` of a package; `__version__` is always among its names.

    Args:
        package: `__name__` of the package.
        modules: module -> the public names that it defines.
    """
    home = {name: module for module, names in modules.items() for name in names}

    def get_attribute(name: str) -> Any:
        if name == "__version__":
            from importlib.metadata import version

            value: Any = version(DISTRIBUTION)
        elif name in home:
            value = getattr(importlib.import_module(home[name]), name)
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)
        return value

    def directory() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home, "__version__"})

    return get_attribute, directory
