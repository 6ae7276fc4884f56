"""Files and folders that systems leave beside a user's own. One list, which every command passes over."""

from __future__ import annotations

# macOS, Synology and Windows; `._*`, `.DS_Store` and `.ipynb_checkpoints` are hidden anyway. In small letters.
_KNOWN = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found"}
_KNOWN |= {"thumbs.db", "ehthumbs.db", "desktop.ini"}


def is_litter(name: str) -> bool:
    """Whether a file or a folder of this name is hidden, or left there by a system."""
    return name.startswith(".") or name.lower() in _KNOWN
