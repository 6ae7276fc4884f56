"""Queues of embeddings of earlier images, which SEED and CompRess compare each image with.

A queue is a ring, as in CompRess's code: rows that do not fit before its end go to its start, so it holds the last
`size` images. SEED's and MoCo's code refuse a size that is not a multiple of the batch. All ranks hold the same queue:
what each of them offers in a step is gathered after the update, in the order of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from student.distributed import all_gather_rows


class Queue(nn.Module):
    """A first-in-first-out queue of unit vectors.

    Args:
        size: most entries; at least a batch.
        width: of each entry.
    """

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.entries = torch.zeros(size, width)  # no buffer: ranks would send it to each other in every step
        self.filled = self.next = 0
        self.offered = self.entries[:0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Queue:
        self.entries = fn(self.entries)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]

    @property
    def held(self) -> Float[Tensor, "n D"]:
        """The entries that are there."""
        return self.entries[: self.filled]

    def offer(self, vectors: Float[Tensor, "B D"]) -> None:
        """Unit vectors of the last forward pass, which take their places once the update is made."""
        self.offered = vectors.detach()

    def push(self, pieces: Sequence[Float[Tensor, "_n D"]], lanes: int = 1) -> None:
        """Put what all ranks offered in an update in place of the oldest entries.

        Args:
            pieces: what was offered on this rank; together no more than the queue holds.
            lanes: `stream.lanes`, which give the order of the batch; read where there are several ranks.
        """
        vectors, size = all_gather_rows(torch.cat(list(pieces)), lanes), len(self.entries)
        places = torch.arange(self.next, self.next + len(vectors), device=self.entries.device) % size
        self.entries[places] = vectors
        self.filled = min(size, max(self.filled, self.next + len(vectors)))
        self.next = (self.next + len(vectors)) % size

    def get_extra_state(self) -> dict[str, Any]:
        """The entries, and where the next ones go."""
        return {"entries": self.held.cpu().clone(), "next": self.next}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the entries from a checkpoint."""
        self.filled, self.next = len(state["entries"]), int(state["next"])
        self.entries[: self.filled] = state["entries"].to(self.entries)


def unit(vectors: Float[Tensor, "*axes D"]) -> Float[Tensor, "*axes D"]:
    """Vectors of norm one."""
    return F.normalize(vectors, dim=-1)
