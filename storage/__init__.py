"""What is at rest, and its contracts: shards, views, codecs and the store. No torch at module level."""

from typing import TYPE_CHECKING

from storage.lazy_names import lazy_names

if TYPE_CHECKING:
    from storage.errors import DamageError, IdentityError, UserError
    from storage.progress import Progress
    from storage.shards.pack import pack
    from storage.store.store import Store
    from storage.views.policy import Policy, policy

    __version__: str
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "storage.errors": ["DamageError", "IdentityError", "UserError"],
            "storage.progress": ["Progress"],
            "storage.shards.pack": ["pack"],
            "storage.store.store": ["Store"],
            "storage.views.policy": ["Policy", "policy"],
        },
    )

__all__ = ["DamageError", "IdentityError", "Policy", "Progress", "Store", "UserError", "pack", "policy"]
