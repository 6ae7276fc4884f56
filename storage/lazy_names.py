"""The public names of a package, imported when they are first used (PEP 562): importing the package loads nothing.

They stand once, in `__init__.pyi`, where type checkers read them too.
"""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

DISTRIBUTION = "teacher-store"


def lazy_names(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """What a package has as `__getattr__`, `__dir__` and `__all__`; `__version__` is among its attributes.

    Args:
        package: `__name__` of the package.
        file: `__file__` of the package; its public names are what `__init__.pyi` beside it imports.
    """
    stub = ast.parse(Path(file).with_name("__init__.pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    home = {alias.name: str(node.module) for node in imports for alias in node.names}

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

    return get_attribute, directory, sorted(home)
