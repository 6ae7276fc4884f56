"""What is at rest, and its contracts: shards, views, codecs and the store. No torch at module level."""

from storage.lazy_names import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
