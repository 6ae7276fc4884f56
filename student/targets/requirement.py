"""What a loss needs from a store."""

from __future__ import annotations

from dataclasses import dataclass

from student.settings import AttentionTensors


@dataclass(frozen=True)
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
    taps: tuple[tuple[str, ...], ...]
    teacher: str | None = None
    target: str | tuple[str, ...] | None = None
    grid: int | None = None

    @property
    def words(self) -> str:
        """The taps that serve."""
        return ", or ".join(" and ".join(taps) for taps in self.taps)

    @property
    def flags(self) -> str:
        """The same as `precompute` takes it; which of several a teacher can give depends on the teacher."""
        first, *others = (f"--target {','.join(taps)}" for taps in self.taps)
        return first + (f" (or, of a teacher that does not give it, {', or '.join(others)})" if others else "")


def taps_of(tensors: AttentionTensors) -> tuple[tuple[str, ...], ...]:
    """What serves: whole attention maps, or q and k, which give them; or vectors themselves."""
    return (("attention",), ("q", "k")) if tensors == "map" else (tuple(tensors),)
