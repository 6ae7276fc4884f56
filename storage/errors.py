"""The one error that users see: what is wrong, where, and what to do. Every other error is a bug."""

from __future__ import annotations

import contextlib
import difflib
import errno
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class UserError(Exception):
    """An error that a user can cause and fix: what is wrong, in which setting, and what to do.

    Its texts mention settings and calls as Python writes them, in backticks (`setting`, `call`). The command line shows
    them as flags and commands (pipeline/messages.py) and exits with status 1.

    Args:
        message: what is wrong, and where.
        setting: the setting that is wrong, as `setting()` writes it.
        hint: what to do about it.
    """

    def __init__(self, message: str, *, setting: str = "", hint: str = "") -> None:
        super().__init__(message)  # the other two travel in __dict__ when it is pickled
        self.message, self.setting, self.hint = message, setting, hint

    def __str__(self) -> str:
        text = f"{self.setting}: {self.message}" if self.setting else self.message
        return f"{text}\n  {self.hint}" if self.hint else text


_WORDS = ("expected", "found")


class IdentityError(UserError):
    """Something is not what the store was made with. Names the field, the expected value, and the value found.

    Args:
        where: the file or object.
        field: what differs.
        expected: its value in the store.
        found: its value now.
        hint: what to do about it.
        words: what the two values are called.
    """

    def __init__(
        self, where: str, field: str, expected: object, found: object, hint: str = "", words: tuple[str, str] = _WORDS
    ) -> None:
        super().__init__(f"{where}: {field}: {words[0]} {expected}, {words[1]} {found}", hint=hint)
        self.args = (where, field, expected, found, hint, words)  # what it is made of again when it is unpickled
        self.where, self.field, self.expected, self.found = where, field, expected, found


class DamageError(UserError):
    """An object of a store is missing or is not the bytes that were written. Names the object."""


# Faults of a disk or of rights, which no waiting mends; and those of a cable or a busy server.
_PERMANENT = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG}
_TRANSIENT = {errno.EIO, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ESTALE, errno.EREMOTEIO}
_TRANSIENT |= {errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ETIMEDOUT, errno.ECONNRESET}


def setting(name: str, value: object = None) -> str:
    """A setting as texts mention it: `` `weights=F` ``, in a recipe by its path: `` `stream.bank=ID` ``.

    A switch is True: `` `new_bank=True` ``. The command line shows a flag in its place.
    """
    text = "" if value is None else "=" + str(value).replace("`", "'")
    return f"`{name}{text}`"


def call(command: str, *settings: str, **named: object) -> str:
    """A command as texts mention it, to be pasted: `` `precompute(teacher=NAME, target=logits, …)` ``.

    Args:
        command: its name.
        settings: values without a name, and `…` for what the reader adds at the end.
        named: setting -> value; a list repeats the setting, True is a switch, None leaves it out.
    """
    parts = [_word(word) for word in settings if word != "…"]
    for name, values in named.items():
        values = values if isinstance(values, list | tuple) else [values]
        parts += [f"{name}={_word(value)}" for value in values if value is not None]
    return f"`{command}({', '.join([*parts, *(word for word in settings if word == '…')])})`"


def _word(value: object) -> str:
    """A value as a shell takes it: it can be pasted, and quotes keep its commas together."""
    return shlex.quote(" ".join(str(value).replace("`", "'").splitlines()))


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
    message = error.strerror if isinstance(error, OSError) and isinstance(error.strerror, str) else str(error)
    if isinstance(error, SyntaxError) and not error.args:  # Python says "None" of it
        message = ""
    text = next(iter(re.sub(r"\x1b\[[0-9;]*m", "", message).strip().splitlines()), "").rstrip()
    return f"{name}: {text}" if kind and text else text or name


def first_few(names: Sequence[str], most: int) -> str:
    """The first names of some, and `…` where there are more."""
    return ", ".join([*names[:most], *["…"] * (len(names) > most)])


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
