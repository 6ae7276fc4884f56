"""From the store to a model: stream, alignment, losses, trainer and evaluation."""

from storage.lazy_names import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
