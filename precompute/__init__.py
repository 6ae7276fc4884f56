"""From shards to the store: teachers, their taps, the exported graphs and the engine that runs them once."""

from storage.lazy_names import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
