"""Memory that processes may take on this machine, and what to say where one died for want of it."""

from __future__ import annotations

from storage.progress import size_text


def memory_limit() -> int:
    """Bytes that all processes here may take together: of the machine, or of its container."""
    from distributed.system import MEMORY_LIMIT  # half a second to import

    return MEMORY_LIMIT


def out_of_memory(advice: str) -> str:
    """The usual cause of a process that was killed, with the memory that processes may take here, and what to do."""
    limit = size_text(memory_limit())
    return f"the usual cause is that memory ran out and the kernel killed it ({limit} may be taken here); {advice}"
