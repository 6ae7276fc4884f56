"""What a loss needs from a store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from storage.errors import call, setting

if TYPE_CHECKING:
    from student.settings import AttentionTensors

TargetTaps = tuple[tuple[str, ...], ...]  # alternatives; the taps of one are read together


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetRequirement:
    """What a loss wants to read: taps that serve, and what the recipe says of its teacher and target.

    Attributes:
        loss: its name; `attention_copy` for that section.
        taps: alternatives, the first that the store has is taken; the taps of one alternative are read together.
        teacher: name of the wanted teacher.
        target: id of the wanted target, or ids of those that are read together.
        grid: side of the maps, where they have one.
    """

    loss: str
    taps: TargetTaps
    teacher: str | None = None
    target: str | tuple[str, ...] | None = None
    grid: int | None = None

    @property
    def words(self) -> str:
        """The taps that serve."""
        return ", or ".join(" and ".join(taps) for taps in self.taps)

    def precompute(self, **settings: object) -> str:
        """The command that keeps the first alternative, and the targets of a teacher that cannot give it."""
        first, *others = (",".join(taps) for taps in self.taps)
        targets = ", or ".join(setting("target", taps) for taps in others)
        command = call("precompute", "…", teacher="NAME", target=first, **settings)
        return command + (f" (or, of a teacher that does not give it, {targets})" if others else "")


def taps_of(tensors: AttentionTensors) -> TargetTaps:
    """What serves: whole attention maps, or q and k, which give them; or vectors themselves."""
    return (("attention",), ("q", "k")) if tensors == "map" else (tuple(tensors),)
