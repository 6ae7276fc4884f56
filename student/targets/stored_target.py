"""A target in a store with its teacher's manifest."""

from __future__ import annotations

from dataclasses import dataclass

from storage.objects.json_record import Record
from storage.store.store import Store


@dataclass(frozen=True)
class Given:
    """What a store gives a loss: the manifest of a target and that of its teacher."""

    target: Record
    teacher: Record

    @property
    def id(self) -> str:
        """Of the target."""
        return str(self.target["id"])


def given_of(store: Store, target: str) -> Given:
    """The manifests of a target and of its teacher."""
    manifest = store.target(target)
    return Given(manifest, store.teacher_of(manifest))
