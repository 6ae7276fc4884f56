"""Where long work tells how far it is, and sizes as it says them; `pipeline.console` shows it to people."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told by the engine, the trainer and whoever else takes long."""

    def say(self, line: str) -> None:
        """A line for people."""

    def start(self, what: str, total: int) -> None:
        """Something with so many steps begins."""

    def advance(self, steps: int) -> None:
        """So many more steps are done."""

    def expect(self, total: int) -> None:
        """There are so many steps, as far as it is known by now."""


def size_text(count: float) -> str:
    """Bytes as people say them."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


class NoProgress:
    """Says nothing."""

    def say(self, line: str) -> None:
        """Nothing."""

    def start(self, what: str, total: int) -> None:
        """Nothing."""

    def advance(self, steps: int) -> None:
        """Nothing."""

    def expect(self, total: int) -> None:
        """Nothing."""
