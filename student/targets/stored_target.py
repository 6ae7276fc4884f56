"""A target in a store with its teacher's manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from storage.store.manifests import TargetManifest, TeacherManifest
    from storage.store.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTarget:
    """What a store gives a loss: the manifest of a target and that of its teacher."""

    target: TargetManifest
    teacher: TeacherManifest

    @property
    def id(self) -> str:
        """Target id."""
        return self.target.id

    @property
    def depth(self) -> int:
        """How many layers or stages the teacher has of the target's tap."""
        return self.teacher.depth(self.target.identity.tap, self.target.identity.at)


Targets = Sequence[StoredTarget]  # those that are read together, in the order of their taps


def stored_target(store: Store, target: str) -> StoredTarget:
    """The manifests of a target and of its teacher."""
    manifest = store.target(target)
    return StoredTarget(target=manifest, teacher=store.teacher_of(manifest))
