"""Constants that several modules share."""

from __future__ import annotations

BLOCK = 64
