"""Shard patterns, such as `train-{000000..000009}.tar`, and the names they stand for."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import braceexpand

from storage.errors import UserError, setting
from storage.objects.urls import is_remote, require_readable, separate
from storage.shards.hints import folder_error, nearest_hint, pack_hint
from storage.shards.image_files import is_image, matching, tars_in

if TYPE_CHECKING:
    from collections.abc import Sequence

MANY = 1_000_000  # names that one pattern may stand for


# ---------------------------------------------------------------------------------------------- names of shards


def expand(patterns: str | Sequence[str]) -> list[str]:
    """The shards that patterns name, in order: braces (`{000000..000004}`), `*` on local paths, `::` between several.

    Raises:
        UserError: a file that is not there (with the nearest one that is), a folder, the same shard twice.
    """
    texts = [patterns] if isinstance(patterns, str) else map(str, patterns)
    named = ((url, text) for text in texts for part in separate(text) for url in braces(part))
    urls = [existing for url, text in named for existing in _existing(url, text)]
    if not urls:
        raise UserError("no shards were given")
    if twice := [url for url, count in Counter(urls).items() if count > 1]:
        raise UserError(f"{min(twice)}: the same shard is named twice")
    return urls


def braces(text: str) -> list[str]:
    """All that a text with braces stands for. Raises UserError."""
    try:
        names = list(itertools.islice(braceexpand.braceexpand(text), MANY + 1))
    except ValueError:
        raise UserError(f"{text}: its braces do not close; expected something like {{000000..000009}}") from None
    if len(names) > MANY:
        raise UserError(f"{text}: its braces stand for more than {MANY:,} names")
    return names


def _existing(url: str, pattern: str) -> list[str]:
    if is_remote(url):
        require_readable(url)
        return [url]
    path = Path(url.removeprefix("file://")).expanduser()
    if path.is_dir():
        raise folder_error(path)
    if path.exists():
        if is_image(path):
            raise UserError(f"{path} is an image; shards are tar files", hint=pack_hint(path.parent.parent))
        if path.suffix.lower() == ".csv":
            raise UserError(f"{path} is a list; shards are tar files", hint=pack_hint(path))
        return [str(path)]
    tars = [p.name for p in tars_in(path.parent) if p.exists()] if path.parent.is_dir() else []
    if any(c in str(path) for c in "*?["):
        if matches := matching(str(path)):
            return matches
        raise UserError(f"{pattern}: no file matches", hint=nearest_hint(path, tars))
    names = braces(pattern) if "::" not in pattern else []
    few = [name for name in names if Path(name).name in tars]
    hint = nearest_hint(path, tars)
    if few:
        hint = f"{len(few)} of its {len(names)} names exist, the last is {few[-1]!r}: end the braces there."
    if "," in path.name and any(part in tars for part in path.name.split(",")):
        hint = f"Join several shards by ::, or give {setting('shards', '…')} for each."
    raise UserError(f"{path}: no such shard (requested by {pattern!r})", hint=hint)
