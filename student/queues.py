"""Queues of embeddings of earlier images, which SEED and CompRess compare each image with.

All ranks hold the same queue: what each of them offers in a step is gathered after the update, whole batches replace
whole batches, and so one rank and several have the same entries, in whatever order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from student.ranks import rows_of_all


class Queue(nn.Module):
    """A first-in-first-out queue of unit vectors.

    Args:
        size: most entries; as many whole batches as go in.
        width: of each entry.
    """

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.entries = torch.zeros(size, width)  # no buffer: ranks would send it to each other in every step
        self.filled = self.next = 0
        self.offered = self.entries[:0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.entries = fn(self.entries)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]

    @property
    def held(self) -> Tensor:
        """The entries that are there, f32 `[n, D]`."""
        return self.entries[: self.filled]

    def offer(self, vectors: Tensor) -> None:
        """Unit vectors `[B, D]` of the last forward pass, which take their places once the update is made."""
        self.offered = vectors.detach()

    def push(self, pieces: Sequence[Tensor]) -> None:
        """Take in what all ranks offered in an update, in place of the oldest.

        Args:
            pieces: what was offered on this rank, `[n, D]` each.
        """
        vectors = rows_of_all(torch.cat(list(pieces)))
        if self.next + len(vectors) > len(self.entries):
            self.next = 0
        self.entries[self.next : self.next + len(vectors)] = vectors
        self.next += len(vectors)
        self.filled = max(self.filled, self.next)

    def get_extra_state(self) -> dict[str, Any]:
        """The entries, and where the next ones go."""
        return {"entries": self.held.cpu().clone(), "next": self.next}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Likewise, from a checkpoint."""
        self.filled, self.next = len(state["entries"]), int(state["next"])
        self.entries[: self.filled] = state["entries"].to(self.entries)


def unit(vectors: Tensor) -> Tensor:
    """Vectors `[…, D]` of norm one."""
    return F.normalize(vectors, dim=-1)
