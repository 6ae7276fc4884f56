"""Batches on their way to the device while a step runs there."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from student.data.batch import Batch

RUNNING = 2  # steps that the host may be ahead of a GPU; each holds a batch in its memory


def batches_on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on a device, one at a time.

    A GPU runs a step after the host has asked for it. Meanwhile the host is here for the next batch, pins its memory
    and copies it on a stream of its own, beside the step. No batch is read that was not asked for, so the position of
    the stream that gives them is right after each.

    Args:
        batches: on the CPU.
        device: where they go.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    ends = deque[torch.cuda.Event]()
    for batch in batches:
        if len(ends) == RUNNING:
            ends.popleft().synchronize()
        with torch.cuda.stream(copying):
            copied = batch.pin_memory().to(device)
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(copying)
        copied.record_stream(computing)  # its memory is free for others once the step has read it
        yield copied
        ends.append(computing.record_event())
