"""Names that people give: an accented letter may be one sign or two (macOS writes two), and is the same letter."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def normalized(name: str) -> str:
    """A name in Unicode's NFC: what is compared, so that names that look alike are alike."""
    return unicodedata.normalize("NFC", name)


def all_normalized(names: Iterable[str]) -> list[str]:
    """Several names in NFC."""
    return [normalized(name) for name in names]
