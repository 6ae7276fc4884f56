"""The shape of the code: circles in the import graph, arrows that go up between layers, and the size of each folder.

`python -m tests.layout` prints all three and exits with 1 where one is not as it should be.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING

import grimp
from importlinter.cli import lint_imports

if TYPE_CHECKING:
    from collections.abc import Mapping, Set

ROOT = Path(__file__).parents[1]  # of the repository
PACKAGES = ("pipeline", "precompute", "storage", "student")
MAX_FILES = 15  # code files in one folder


def file_imports() -> dict[str, set[str]]:
    """Module -> the modules of this repository that it imports; imports for types alone and in functions count too.

    That `import a.b` also runs `a/__init__.py` is not counted.
    """
    graph = grimp.build_graph(*PACKAGES, exclude_type_checking_imports=False, cache_dir=None)
    return {module: set(graph.find_modules_directly_imported_by(module)) for module in graph.modules}


def import_circles(imports: Mapping[str, Set[str]]) -> list[list[str]]:
    """Circles as module names, each imports the next and the first stands last again; without the last arrow of each
    there would be no circle."""
    arrows = {module: set(imported) for module, imported in imports.items()}
    circles: list[list[str]] = []
    while True:
        try:
            TopologicalSorter(arrows).prepare()
        except CycleError as error:
            circle = error.args[1][::-1]  # given from the imported to its importer
            arrows[circle[-2]].remove(circle[-1])
            circles.append(circle)
        else:
            return circles


def is_code(path: Path) -> bool:
    """Whether a file counts: an `__init__.py` does where it holds more than a docstring."""
    if path.name != "__init__.py":
        return True
    return any(
        not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        for node in ast.parse(path.read_text(encoding="utf-8")).body
    )


def folder_sizes(root: Path) -> list[tuple[str, int]]:
    """(folder, number of its own code files) of the packages and the tests below `root`, the largest first."""
    files = (path for package in (*PACKAGES, "tests") for path in (root / package).rglob("*.py"))
    sizes = Counter(path.parent.relative_to(root).as_posix() for path in files if is_code(path))
    return sorted(sizes.items(), key=lambda item: (-item[1], item[0]))


def main() -> int:
    """Print the report; the exit status."""
    circles = import_circles(file_imports())
    print(f"Circles of files: {len(circles)}")
    for circle in circles:
        print("  " + " -> ".join(circle))
    sizes = folder_sizes(ROOT)
    print(f"\nCode files of each folder (at most {MAX_FILES}):")
    for folder, size in sizes:
        print(f"{size:4} {folder}" + (" - too many" if size > MAX_FILES else ""))
    print("\nArrows between layers, by import-linter:")
    broken = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True, no_logo=True)
    return int(bool(circles) or sizes[0][1] > MAX_FILES or broken != 0)


if __name__ == "__main__":
    sys.exit(main())
