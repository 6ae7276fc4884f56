"""What people see while something runs: lines and a progress bar on stderr; results on stdout."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING

from pipeline.messages import as_flags, with_flags

if TYPE_CHECKING:
    from rich.progress import Progress

PLAIN_EVERY = 10.0  # seconds between lines where stderr is no terminal


class Console:
    """Progress for people: a bar with rate and time left on a terminal, plain lines elsewhere; `with` takes it away."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._what, self._total, self._done = "", 0, 0
        self._began = self._said = 0.0

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def say(self, line: str) -> None:
        """A line."""
        line = as_flags(line)
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def start(self, what: str, total: int) -> None:
        """Something with so many steps begins."""
        self.stop()
        self._what, self._total, self._done = what, total, 0
        self._began = self._said = time.monotonic()
        if sys.stderr.isatty():
            from rich.console import Console as Rich
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
            columns += [TextColumn("{task.fields[rate]}"), TimeRemainingColumn()]
            self._bar = Progress(*columns, console=Rich(stderr=True), transient=True)
            self._bar.add_task(what, total=total, rate="")
            self._bar.start()

    def advance(self, steps: int) -> None:
        """So many more steps are done."""
        self._done += steps
        now = time.monotonic()
        rate = self._done / max(now - self._began, 1e-9)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], advance=steps, rate=f"{rate:,.0f}/s")
        elif now - self._said >= PLAIN_EVERY:
            self._said = now
            left = (self._total - self._done) / max(rate, 1e-9)
            self.say(f"{self._what}: {self._done:,}/{self._total:,}, {rate:,.1f}/s, {left:,.0f} s left")

    def expect(self, total: int) -> None:
        """There are so many steps, as far as it is known by now."""
        self._total = total
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], total=total)

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def show(result: object, lines: list[str], as_json: bool) -> None:
    """The result on stdout: one JSON object with the fields of a data class or the keys of a dict, or lines."""
    print(json.dumps(with_flags(result)) if as_json else as_flags("\n".join(lines)))
