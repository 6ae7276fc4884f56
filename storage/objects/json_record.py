"""JSON that carries its own digest, so that a changed bit in it is an error and never a wrong number.

A record is one JSON object in its canonical spelling (sorted keys, no white space, a closing newline) whose
`digest` is the sha256 of the same spelling without it. Any other spelling of the same content is refused too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from typing import Any

from storage.errors import DamageError, first_line

Record = dict[str, Any]


def canonical(content: Any) -> bytes:
    """The one spelling of JSON that is hashed and written."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.encode("ascii")


def digest_of(content: Any) -> str:
    """Sha256, in hex, of the canonical spelling of some content."""
    return hashlib.sha256(canonical(content)).hexdigest()


def to_json(content: Record) -> bytes:
    """The bytes of a record: `content` with its digest."""
    body = {key: value for key, value in content.items() if key != "digest"}
    return canonical({**body, "digest": digest_of(body)}) + b"\n"


def from_json(data: bytes, name: str) -> Record:
    """The record in `data`; `name` is what errors call it.

    Raises:
        DamageError: it is not a record, or not the bytes that were written.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamageError(f"{name}: damaged: not JSON ({first_line(error)})") from None
    if not isinstance(content, dict) or not isinstance(content.get("digest"), str):
        raise DamageError(f"{name}: damaged: it carries no digest of its own")
    with contextlib.suppress(ValueError):  # Python reads NaN, which is no JSON
        if to_json(content) == data:
            return content
    raise DamageError(f"{name}: damaged: its content does not agree with its own digest")
