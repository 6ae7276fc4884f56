"""Where long work tells how far it is; `pipeline.console` shows it to people."""

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


class Quiet:
    """Says nothing."""

    def say(self, line: str) -> None:
        """Nothing."""

    def start(self, what: str, total: int) -> None:
        """Nothing."""

    def advance(self, steps: int) -> None:
        """Nothing."""

    def expect(self, total: int) -> None:
        """Nothing."""
