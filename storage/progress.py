"""How long work reports its progress, and sizes in words; `pipeline.console` shows them."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told by the engine, the trainer and whoever else takes long."""

    def say(self, line: str) -> None:
        """A human-readable line."""

    def start(self, what: str, total: int) -> None:
        """Something with so many steps begins."""

    def advance(self, steps: int) -> None:
        """So many more steps are done."""

    def expect(self, total: int) -> None:
        """There are so many steps, as far as it is known by now."""


def size_text(count: float) -> str:
    """A number of bytes, human-readable."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


class NoProgress:
    """Says nothing."""

    def _ignore(self, *arguments: object, **named: object) -> None:
        pass

    say = start = advance = expect = _ignore
