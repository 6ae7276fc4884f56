"""Memory of this machine, for messages about processes that died for want of it."""

from __future__ import annotations

from storage.progress import size_text


def out_of_memory(advice: str) -> str:
    """The usual cause of a process that was killed, with the memory that processes may take here, and what to do."""
    from distributed.system import MEMORY_LIMIT  # honors the limits of containers; a second to import

    return (
        "the usual cause is that memory ran out and the kernel killed it "
        f"({size_text(MEMORY_LIMIT)} may be taken here); {advice}"
    )
