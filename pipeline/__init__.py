"""The command line: words for people."""

from typing import TYPE_CHECKING

from storage.lazy_names import lazy_names

if TYPE_CHECKING:
    from pipeline.cli import main
    from pipeline.recipes.loader import load_recipe

    __version__: str
else:
    __getattr__, __dir__ = lazy_names(__name__, {"pipeline.cli": ["main"], "pipeline.recipes.loader": ["load_recipe"]})

__all__ = ["load_recipe", "main"]
