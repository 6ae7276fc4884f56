"""The one error that people see: what is wrong, where, and what to do. Everything else is a bug."""

from __future__ import annotations

import contextlib
import difflib
import errno
import re
from collections.abc import Iterable
from pathlib import Path


class UserError(Exception):
    """An error that a user can cause and mend. The command line prints its text and exits with status 1."""


class IdentityError(UserError):
    """Something is not what the store was made with. Names the field, what was expected and what was found.

    Where both sides have a name of their own (what the store has, what was asked for), `words` says them.
    """

    def __init__(
        self, where: str, field: str, expected: object, found: object, do: str = "",
        words: tuple[str, str] = ("expected", "found"),
    ) -> None:  # fmt: skip
        self.where, self.field, self.expected, self.found = where, field, expected, found
        self.do, self.words = do, words
        super().__init__(where, field, expected, found, do, words)  # the arguments again, so that it can be pickled

    def __str__(self) -> str:
        text = f"{self.where}: {self.field}: {self.words[0]} {self.expected}, {self.words[1]} {self.found}"
        return f"{text}\n  {self.do}" if self.do else text


class DamageError(UserError):
    """An object of a store is missing or is not the bytes that were written. Names the object."""


# Faults of a disk or of rights, which no waiting mends; and those of a cable or a busy server.
_PERMANENT = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG}
_TRANSIENT = {errno.EIO, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ESTALE, errno.EREMOTEIO, errno.ENETDOWN,
            errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ETIMEDOUT, errno.ECONNRESET}  # fmt: skip


def is_transient(error: OSError) -> bool:
    """Whether an error is surely a passing fault of input or output, and says nothing about a file's content."""
    return isinstance(error, TimeoutError | ConnectionError) or error.errno in _TRANSIENT


def is_permanent(error: OSError) -> bool:
    """Whether an error is one of a disk or of rights, so that trying again is useless."""
    return isinstance(error, PermissionError) or error.errno in _PERMANENT


def first_line(error: BaseException, *, kind: bool = False) -> str:
    """What an error of Python or of a library says, on one line; the name of its type where it says nothing.

    Of an error of the system it is what the system says, without the path; a terminal's colors are taken away. `kind`
    puts the type's name before it.
    """
    name = type(error).__name__
    said = error.strerror if isinstance(error, OSError) and isinstance(error.strerror, str) else str(error)
    if isinstance(error, SyntaxError) and not error.args:  # Python says "None" of it
        said = ""
    lines = (line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", said).splitlines())
    text = next(filter(None, lines), "")
    return f"{name}: {text}" if kind and text else text or name


def display_path(path: Path) -> str:
    """A path as messages call it: from the current folder on where it lies below it, else whole."""
    with contextlib.suppress(ValueError, OSError):  # elsewhere; or the current folder is gone
        return str(path.relative_to(Path.cwd()))
    return str(path)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`Did you mean …?` for the known word closest to `word`, or the known words when none is close."""
    known = sorted(known)
    alike = {other: difflib.SequenceMatcher(None, other, word).ratio() for other in known}
    best = max(known, key=alike.__getitem__, default="")  # the first of several that are as close
    if alike.get(best, 0) >= 0.5:
        return f"Did you mean {best!r}?"
    return f"Known: {', '.join(known)}." if known else "None is known here."
