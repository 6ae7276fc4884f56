"""How texts of the lower rooms look on the command line: settings become flags, calls become commands."""

from __future__ import annotations

import re
from typing import Any

# `name=value` and `name(…)`, as storage.errors writes them; nothing else in backticks is touched.
_MENTION = re.compile(r"`(?P<name>[a-z][a-z0-9_]*(?:\.[A-Za-z0-9_*]+)*)(?:=(?P<value>[^`]*)|\((?P<parts>[^`]*)\))`")
# One part of a call: words in quotes hold anything.
_PART = re.compile(r"(?:'[^']*'|\"[^\"]*\"|,(?! )|[^,'\"])+")


def as_flags(text: str) -> str:
    """A text with its settings as flags and its calls as commands.

    `` `input_size=64` `` becomes `--input-size 64`, `` `new_bank=True` `` `--new-bank`, `` `stream.bank=B` ``
    `--set stream.bank=B`, and `` `precompute(teacher=T, target=logits)` `` `pipeline precompute --teacher T --target
    logits`, in backticks unless it has the line to itself.
    """
    lines = []
    for line in text.split("\n"):
        alone = _MENTION.fullmatch(line.strip())
        lines.append(_MENTION.sub(lambda match, alone=alone: _shown(match, quoted=alone is None), line))  # type: ignore[misc]
    return "\n".join(lines)


def with_flags(result: Any) -> Any:
    """A result (plain data, records and data classes) as plain data, with all its texts as `as_flags` gives them."""
    if isinstance(result, str):
        return as_flags(result)
    if isinstance(result, dict):
        return {key: with_flags(value) for key, value in result.items()}
    if isinstance(result, list | tuple):
        return [with_flags(value) for value in result]
    if result is None or isinstance(result, int | float):
        return result
    from storage.objects.record_schema import plain

    return with_flags(plain(result))


def _shown(match: re.Match[str], quoted: bool) -> str:
    name, value, parts = match["name"], match["value"], match["parts"]
    if parts is None:
        return _flag(name, value)
    words = ["pipeline", name.replace("_", "-")]
    for part in map(str.strip, _PART.findall(parts)):
        key, equals, text = part.partition("=")
        words.append(_flag(key, text) if equals and re.fullmatch(r"[a-z][a-z0-9_.]*", key) else part)
    command = " ".join(filter(None, words))
    return f"`{command}`" if quoted else command


def _flag(name: str, value: str) -> str:
    if "." in name:
        return f"--set {name}={value}"
    flag = f"--{name.replace('_', '-')}"
    return flag if value == "True" else f"{flag} {value}"
